"""Take along what a model's folder holds beside its weights, its config and its tokenizer.

Only kinds of files that tools read go along, such as chat templates, the config of a preprocessor,
and the modules of sentence-transformers with the weights of their layers: without them such a tool
falls back to other numbers, in silence. Weights in any other place, code, hidden files, the model
card, and what leads out of the folder stay behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from liar_ext.checkpoint.folder import (
    CARD_FILE,
    MODULES_FILE,
    OWN_FOLDER,
    TOKENIZER_FILES,
    VOCABULARY_FILE,
)
from liar_ext.checkpoint.inspection import fields_of, lies_inside
from liar_ext.models.sites import sites
from liar_ext.system.errors import InputError, one_line, refusing
from liar_ext.system.files import UNREADABLE, listing, mapping, read_json, read_value
from liar_ext.system.progress import quiet

DIMENSIONS = ("word_embedding_dimension", "embedding_dimension")  # of pooling, old and new
MOST = 64 << 20  # bytes of one file; vocabularies have some millions
MOST_CARD = 64 << 10  # characters of a model card, whose first lines name the licence
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
OLDER = (".model", ".spm", ".tiktoken", ".bpe")  # vocabularies of other tools
# Fields of transformers 4, and where version 5 has them in rope_parameters.
OLDER_NAMES = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
MODERNBERT = {"global_rope_theta": "full_attention", "local_rope_theta": "sliding_attention"}
OLDER_NAMES_OF = {
    "gemma3_text": {"rope_theta": "full_attention", "rope_local_base_freq": "sliding_attention"},
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "modernbert": MODERNBERT,
    "modernbert-decoder": MODERNBERT,
    "olmo3": {"rope_theta": "full_attention"},
}
PHI3_SCALING = {"short_factor", "long_factor", "original_max_position_embeddings"}
DOWNLOADED = ("*.json", "*.jinja", "*.txt", "*.md", "*/config.json")


def source_folder(name: str) -> Path | None:
    """Return the model folder that a model was loaded from, or what the hub's cache has of it."""
    if os.path.isdir(name):  # unlike Path's, False for no name, and for one that no file can have
        return Path(name) if (Path(name) / "config.json").is_file() else None
    if not name or name.count("/") > 1 or Path(name).suffix == ".gguf":
        return None
    from huggingface_hub import snapshot_download

    for offline in (False, True):
        with suppress(Exception):  # no repository, no network: as many kinds as libraries
            found = snapshot_download(name, allow_patterns=DOWNLOADED, local_files_only=offline)
            return Path(found)
    return None


def carry(source: Path, folder: Path, model: nn.Module, *, tokenizer: bool) -> list[str]:
    """Copy what goes along from one folder to another, where it isn't there already.

    Files of a ``tokenizer`` that was saved already stay behind, as do those that list tokens which
    the model lacks. Returned is a sentence for each other file that stays behind.
    """
    said = []
    for path, name in _files(source, said):
        if (folder / name).exists() or (tokenizer and name in TOKENIZER):
            continue
        if not lies_inside(path, source):
            said.append(f"{name} of {source} leads out of that folder and stays behind.")
        elif path.stat().st_size > MOST:
            said.append(f"{name} of {source} is larger than {MOST >> 20} MiB and stays behind.")
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    said += _fit_modules(folder, sites(model)[0].d_out)
    if getattr(model, "liar_vocabulary", None) is None:
        listed = source / VOCABULARY_FILE
        with suppress(InputError):  # of a damaged list
            tokens = kept_tokens(source, "save_pruned") if lies_inside(listed, source) else None
            if tokens and len(tokens) == len(model.get_input_embeddings().weight):
                shutil.copyfile(listed, folder / VOCABULARY_FILE)
        return said
    for path in folder.iterdir():
        if path.suffix in OLDER:
            path.unlink()
    known = {*TOKENIZER, *(path.name for path in source.iterdir() if path.suffix in OLDER)}
    left = sorted(n for n in known if (source / n).is_file() and not (folder / n).exists())
    lists = [name for name in left if not name.startswith(("special_tokens", "chat_template"))]
    if lists:
        names = ", ".join(lists)
        said.append(f"{names} of the dense model would list removed tokens and stay behind.")
    return said


def license_of(source: Path | None) -> str | None:
    """Return the licence that a folder's model card names, if it does in a single word."""
    import yaml

    if source is None or not (source / CARD_FILE).is_file():
        return None
    try:
        with open(source / CARD_FILE, encoding="utf-8") as file:
            text = file.read(MOST_CARD)
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found = front.get("license")
    except (OSError, ValueError, IndexError, AttributeError, yaml.YAMLError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) < 40 and found.isprintable() else None


def _files(source: Path, said: list[str]) -> Iterator[tuple[Path, str]]:
    for path in sorted(source.iterdir()):
        own = path.name == CARD_FILE or path.name.startswith(f"{OWN_FOLDER}_")
        if path.is_file() and not own and _goes(path.name, weights=False):
            yield path, path.name
    for name in _modules(source, said):
        for path in sorted((source / name).rglob("*")):
            if path.is_file() and _goes(path.name, weights=True):
                yield path, str(path.relative_to(source))


def _goes(name: str, weights: bool) -> bool:
    name = name.lower()
    known = name.endswith(KINDS) or name.partition(".")[0] in LICENSES
    return (weights if name.endswith(WEIGHTS) else known) and not name.startswith(".")


def _modules(source: Path, said: list[str]) -> list[str]:
    """Return the folders of the modules that ``modules.json`` names; none of the model itself."""
    path = source / MODULES_FILE
    if not path.is_file():
        return []
    try:
        names = [str(module["path"]) for module in read_value(path)]
    except (*UNREADABLE, KeyError, TypeError) as error:
        said.append(f"{path} can't be read, so no module it names goes along: {one_line(error)}")
        return []
    found = []
    for name in filter(None, names):
        parts = PurePosixPath(name).parts
        below = len(parts) == 1 and parts[0] not in ("..", OWN_FOLDER) and not name.startswith("/")
        if below and not os.path.isdir(source / name):  # nor has it a name that no file can have
            continue
        if below and lies_inside(source / name, source):
            found.append(name)
        else:
            said.append(f"{path} names {name[:80]!r}, which leads elsewhere and stays behind.")
    return found


def _fit_modules(folder: Path, hidden: int) -> list[str]:
    """Write a smaller hidden size into the pooling modules; tell of layers that read theirs."""
    said, configs, narrowed = [], {}, False
    for path in sorted(folder.glob("*/config.json")):
        with suppress(*UNREADABLE):
            configs[path] = mapping(read_value(path))
    for path, fields in configs.items():
        wrong = {name: hidden for name in DIMENSIONS if fields.get(name, hidden) != hidden}
        if wrong:
            narrowed = True
            path.write_text(json.dumps(fields | wrong, indent=2) + "\n", encoding="utf-8")
    for path, fields in configs.items():
        if narrowed and "in_features" in fields:
            said.append(
                f"{path.parent.name} reads {fields['in_features']} features of the dense model's "
                f"pooling, and the pruned model has {hidden} hidden features: keep the hidden size "
                "of a model that such a layer follows."
            )
    return said


def complete_config(folder: Path) -> None:
    """Write what config.json says in ``rope_parameters`` in the fields of transformers 4 as well.

    Transformers 5 writes the first alone; version 4, and what follows its spelling, would take
    defaults in silence. Version 5 reads both, and prefers ``rope_scaling``.
    """
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for part in [fields, *(each for _, each in fields_of(fields) if isinstance(each, dict))]:
        rope, kind = part.get("rope_parameters"), part.get("model_type")
        if not isinstance(rope, Mapping):
            continue
        names = OLDER_NAMES | OLDER_NAMES_OF.get(kind, {})
        found = {older: rope[name] for older, name in names.items() if name in rope}
        for older, value in found.items():
            part.setdefault(older, value["rope_theta"] if isinstance(value, Mapping) else value)
        if "rope_theta" not in found:
            continue  # one scaling for each type of layer
        scaling = {k: v for k, v in rope.get("full_attention", rope).items() if k != "rope_theta"}
        more = scaling.keys() - {"rope_type", "type", "partial_rotary_factor"}
        if kind == "phi3" and more == PHI3_SCALING:  # version 4 refuses any other
            short, long = scaling["short_factor"], scaling["long_factor"]
            scaling = {"type": "longrope", "short_factor": short, "long_factor": long}
        part.setdefault("rope_scaling", scaling if more else None)  # some have one by default
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_vocabulary(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write which tokens were kept, if some were not; refuse a tokenizer that has others."""
    facts = getattr(model, "liar_vocabulary", None)
    if facts is None:
        return
    if tokenizer is None or not _agrees(tokenizer, facts["checks"]):
        raise InputError(
            "save_pruned: tokens were removed from the model, and the tokenizer is not the one "
            "without them; pass tokenizer=, which liar_ext.keep_tokens returned"
        )
    (folder / VOCABULARY_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def kept_tokens(folder: Path, operation: str) -> list[int] | None:
    """Return the ids that a folder's tokens had in its dense model; None if it has them all."""
    if not (folder / VOCABULARY_FILE).is_file():
        return None
    kept = read_json(folder / VOCABULARY_FILE, operation).get("kept")
    if not isinstance(kept, list) or not kept or {type(each) for each in kept} != {int}:
        raise InputError(
            f"{operation}: {folder / VOCABULARY_FILE} is damaged; copy the folder again"
        )
    return kept


def compare_tokenization(folder: Path) -> bool | None:
    """Tell whether a folder's tokenizer reads the stored texts as it did; None without any."""
    if not (folder / VOCABULARY_FILE).is_file():
        return None
    facts = read_json(folder / VOCABULARY_FILE, "verify")
    checks = [mapping(each) for each in listing(facts.get("checks"))]
    if not all(isinstance(each.get("text"), str) for each in checks):
        raise InputError(f"verify: {folder / VOCABULARY_FILE} is damaged; copy the folder again")
    from transformers import AutoTokenizer

    with refusing("verify: the tokenizer can't be loaded", "", Exception), quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return _agrees(tokenizer, checks)


def _agrees(tokenizer: Any, checks: list[Mapping[str, Any]]) -> bool:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    return bool(checks) and all(inner.encode(each["text"]) == each.get("ids") for each in checks)
