"""Say how vLLM takes a folder; nothing is written."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from liar_ext.checkpoint.inspection import read_config
from liar_ext.export import is_unequal
from liar_ext.system.errors import InputError

GROUP = "vllm.general_plugins"
# Model types whose unequal layers the plug-in builds, with a bias in any consumer.
SERVED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")


def export(folder: Path, out: Path) -> list[str]:
    """Return how vLLM takes ``folder``; refuse one that it doesn't, with what to do instead."""
    fields = read_config(folder, "export")
    command = f"vllm serve {folder}"
    if not is_unequal(fields):
        return [f"Nothing to write for equal layers: {command}."]
    kind = str(fields.get("model_type"))[:40]
    if kind not in SERVED:
        raise InputError(
            f"export: --to vllm: unequal layers are built for {', '.join(SERVED)}, not for {kind}; "
            "prune with --uniform-layers, or, without experts, export it with --to uniform"
        )
    notes = [f"Nothing to write: the plug-in of liar_ext builds the unequal layers: {command}."]
    if not any(each.value.startswith("liar_ext") for each in entry_points(group=GROUP)):
        notes.append(f"It isn't installed here: install liar_ext, with its entry point {GROUP}.")
    notes.append("All workers need liar_ext installed, and no --trust-remote-code.")
    return notes
