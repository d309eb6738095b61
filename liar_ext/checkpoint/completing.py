"""What ``save_pretrained`` of transformers leaves out of a config that other versions read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def complete_config(folder: Path) -> None:
    """Write ``rope_theta`` and ``rope_scaling`` beside ``rope_parameters`` into config.json.

    Transformers 5 writes the last alone; version 4, and what follows its spelling, would take the
    default of 10,000 in silence.
    """
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for part in _parts(fields):
        rope = part.get("rope_parameters")
        if not isinstance(rope, Mapping) or "rope_theta" not in rope:
            continue  # none, or one for each type of layer, which version 4 spells in its own ways
        part.setdefault("rope_theta", rope["rope_theta"])
        others = {name: value for name, value in rope.items() if name != "rope_theta"}
        if others.get("rope_type", "default") != "default":
            part.setdefault("rope_scaling", others)
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _parts(fields: Any) -> Iterator[dict[str, Any]]:
    """Yield a config and every config inside of it."""
    if isinstance(fields, dict):
        yield fields
        for name, value in fields.items():
            if name.endswith("_config") and name != "per_layer_config":
                yield from _parts(value)
