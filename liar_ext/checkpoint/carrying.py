"""Take along what a model's folder holds beside its weights, its config and its tokenizer.

Chat templates, the config of a preprocessor, the modules of sentence-transformers: a tool that
reads them falls back to other numbers, in silence, where they are missing. Only kinds of files that
such tools read go along. Left behind are weights in any format, which are those of the dense model,
code, hidden files, the model card, and what leads out of the folder. ``modules.json`` names folders
that go along, too, with the weights of their layers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from liar_ext.checkpoint.names import CARD_FILE, OWN_FOLDER, TOKENIZER_FILES
from liar_ext.errors import one_line

MODULES_FILE = "modules.json"
MOST = 64 << 20  # bytes of one file; vocabularies have some millions
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".ot", ".tflite", ".npz", ".index.json", ".data"),
)
KINDS = (".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".spm", ".yaml", ".yml")
LICENSES = ("license", "licence", "notice", "copying")
TOKENIZER = (
    *TOKENIZER_FILES,
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.md", "*/config.json")


def source_folder(name: str) -> Path | None:
    """Return the folder that a model was loaded from: itself, or what the hub's cache has of it.

    Only a model folder is one. What was built from a config has no name, and a GGUF file goes by
    the folder that it lies in, where anything may lie beside it.
    """
    if os.path.isdir(name):  # unlike Path's, False for no name, and for one that no file can have
        return Path(name) if (Path(name) / "config.json").is_file() else None
    if name.count("/") != 1 or Path(name).suffix == ".gguf":
        return None
    from huggingface_hub import snapshot_download

    for offline in (False, True):
        try:
            found = snapshot_download(name, allow_patterns=DOWNLOADED, local_files_only=offline)
            return Path(found)
        except Exception:  # no such repository, no network: as many kinds as there are libraries
            continue
    return None


def carry(source: Path, folder: Path, hidden: int, *, tokenizer: bool) -> list[str]:
    """Copy what goes along from one folder to another, where it isn't there already.

    Parameters
    ----------
    source, folder : Path
        From where, and to where.
    hidden : int
        Hidden features of the pruned model, which a pooling module counts too.
    tokenizer : bool
        Whether the tokenizer was saved already, so that its files stay behind.

    Returns
    -------
    list of str
        A sentence for each file that stays behind although its kind goes along.
    """
    said = []
    for path, name in _files(source, said):
        if (folder / name).exists() or (tokenizer and name in TOKENIZER):
            continue
        if not _lies_inside(path, source):
            said.append(f"{name} of {source} leads out of that folder and stays behind.")
        elif path.stat().st_size > MOST:
            said.append(f"{name} of {source} is larger than {MOST >> 20} MiB and stays behind.")
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    return said + _fit_modules(folder, hidden)


def license_of(source: Path | None) -> str | None:
    """Return the licence that a folder's model card names, if it does in a single word."""
    import yaml

    try:
        text = (source / CARD_FILE).read_text(encoding="utf-8")[:MOST] if source else ""
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found = front.get("license")
    except (OSError, ValueError, IndexError, AttributeError, yaml.YAMLError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) < 40 and found.isprintable() else None


def _files(source: Path, said: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files that go along, with their names in the folder."""
    for path in sorted(source.iterdir()):
        own = path.name == CARD_FILE or path.name.startswith(f"{OWN_FOLDER}_")
        if path.is_file() and not own and _goes(path.name) and not _is_weight(path.name):
            yield path, path.name
    for name in _modules(source, said):
        for path in sorted((source / name).rglob("*")):
            if path.is_file() and (_goes(path.name) or _is_weight(path.name)):
                yield path, str(path.relative_to(source))


def _goes(name: str) -> bool:
    """Tell whether a file is of a kind that goes along."""
    name = name.lower()
    known = name.endswith(KINDS) or name.partition(".")[0] in LICENSES
    return known and not name.startswith(".")


def _is_weight(name: str) -> bool:
    return name.lower().endswith(WEIGHTS) and not name.startswith(".")


def _modules(source: Path, said: list[str]) -> list[str]:
    """Return the folders of the modules that ``modules.json`` names; none of the model itself."""
    path = source / MODULES_FILE
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > MOST:
            raise ValueError("it is too large")
        names = [str(module["path"]) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said.append(f"{path} can't be read, so no module it names goes along: {one_line(error)}")
        return []
    found = []
    for name in filter(None, names):
        parts = PurePosixPath(name).parts
        below = len(parts) == 1 and parts[0] not in ("..", OWN_FOLDER) and not name.startswith("/")
        if below and _lies_inside(source / name, source):
            found.append(name)
        else:
            said.append(f"{path} names {name[:80]!r}, which leads elsewhere and stays behind.")
    return found


def _lies_inside(path: Path, source: Path) -> bool:
    """Tell whether a file lies in the folder, be it through links inside of the hub's cache."""
    target, home = path.resolve(), source.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(blobs)


def _fit_modules(folder: Path, hidden: int) -> list[str]:
    """Write a smaller hidden size into the pooling modules; tell of layers that read theirs."""
    said, configs, narrowed = [], {}, False
    for path in sorted(folder.glob("*/config.json")):
        try:
            configs[path] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            said.append(f"{path.parent.name}/{path.name} can't be read and was copied as it is.")
    for path, fields in configs.items():
        if isinstance(fields, dict) and fields.get("word_embedding_dimension", hidden) != hidden:
            narrowed = True
            fields["word_embedding_dimension"] = hidden
            path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    for path, fields in configs.items():
        if narrowed and isinstance(fields, dict) and "in_features" in fields:
            said.append(
                f"{path.parent.name} reads {fields['in_features']} features of the dense model's "
                f"pooling, and the pruned model has {hidden} hidden features: keep the hidden size "
                "of a model that such a layer follows."
            )
    return said


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
