"""Look a model folder over before anything is built from it.

A folder comes from anywhere. Its JSON is read with bounds, and sizes that its config claims are
compared with the headers of the weights, before memory is taken for them. Its code is run only if
it is, byte for byte, that of ``save_pruned``, and by ``verify`` alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from liar_ext.checkpoint.folder import (
    LOADER_CODE,
    LOADER_FILE,
    LOADER_MODULE,
    MARK_VERSION,
    OLD_MARK_VERSION,
)
from liar_ext.checkpoint.stock_config import auto_names, model_class
from liar_ext.system.errors import InputError, asking_hub, refusing
from liar_ext.system.files import mapping, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFUSION = "diffusion_pytorch_"  # what diffusers begins both names with
CLASS_NAME = "_class_name"  # what its configs call the class of a model
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
LARGEST = 2**27  # of a size; the largest contexts have 10⁷ positions
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = (
    *("hidden_size", "n_embd", "dim", "d_model", "word_embed_proj_dim"),
    *("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim"),
    *("num_kv_heads", "mlp_ratio"),
    *("vocab_size", "max_position_embeddings", "n_positions"),
    *("image_size", "patch_size", "num_channels"),
)
# Ends of the files that loaders read beside weights, and so put into what is saved.
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes")
TEXT_PLACES = ("*", "additional_chat_templates/*", "*tokenizer/*")
# Fields by which a config sends transformers to other files, other code or another repository.
DETOURS = ("configuration_files", "transformers_weights", "custom_generate")


@dataclass(frozen=True)
class Folder:
    """A model folder: the fields of its config, and shapes by name from the weights' headers."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def inspect_folder(path: Path, operation: str) -> Folder:
    """Read the config and the headers of the weights of a folder; refuse what nobody should load.

    That is files that are missing, damaged, no safetensors or outside of the folder, texts that are
    links out of it, and a config that can't be that of the weights.
    """
    config = read_config(path, operation)
    _check_texts(path, operation)
    if (path / "adapter_config.json").exists():
        raise InputError(
            f"{operation}: {path} holds an adapter of PEFT; merge it into its model and save that"
        )
    if (path / "generation_config.json").exists():
        read_json(path / "generation_config.json", operation)
    tensors: dict[str, tuple[int, ...]] = {}
    kinds = (OSError, SafetensorError, ValueError, OverflowError)
    for file in _weight_files(path, operation):
        check_file(file, operation)
        with refusing(f"{operation}: {file} is damaged", "copy the folder again", *kinds):
            with safe_open(file, framework="pt") as it:
                tensors |= {name: tuple(it.get_slice(name).get_shape()) for name in it.keys()}  # noqa: SIM118
    _check_config(config, len(tensors), f"{operation}: config.json of {path}")
    return Folder(path, config, tensors)


def read_config(path: Path, operation: str) -> dict[str, Any]:
    """Return the fields of a folder's config; InputError if there is none that can be read."""
    if not os.path.exists(path / "config.json"):  # unlike Path's, False for what can't be read
        if os.path.exists(path / "model_index.json"):
            refuse_diffusion(operation, f"{path} holds a pipeline of diffusers")
        what = "holds no readable config.json" if os.path.exists(path) else "doesn't exist"
        raise InputError(f"{operation}: {path} {what}; give a model folder")
    fields = read_json(path / "config.json", operation)
    if CLASS_NAME in fields and operation != "load_pruned":
        refuse_diffusion(operation, f"{path} holds a model of diffusers")
    return fields


def refuse_diffusion(operation: str, what: str) -> NoReturn:
    """Raise InputError for what Python alone does with models of diffusers."""
    raise InputError(
        f"{operation}: {what}; in Python, liar_ext.prune(pipeline.transformer, batches) prunes it "
        "and liar_ext.load_pruned loads the result, see docs/howto/diffusion.md"
    )


def lies_inside(path: Path, folder: Path) -> bool:
    """Tell whether a file lies in the folder, also by links inside of the hub's cache."""
    target, home = (Path(os.path.realpath(each)) for each in (path, folder))
    caches = (up.parent for up in home.parents if up.name == "snapshots")
    return any(map(target.is_relative_to, (home, *(up / "blobs" for up in caches))))


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of the folder."""
    if not lies_inside(path, folder):
        raise InputError(
            f"{path} leads to {os.path.realpath(path)}, outside of the folder; remove the link, or "
            "put the file itself there"
        )


def _check_texts(path: Path, operation: str) -> None:
    """Refuse texts that loaders would take from elsewhere, or wait for without end."""
    for file in sorted(file for place in TEXT_PLACES for file in path.glob(place)):
        name = file.name.lower()
        read = name.endswith(TEXTS) and not name.endswith(".index.json")
        if read and not name.startswith(".") and not file.is_dir():
            check_inside(file, path)
            check_file(file, operation)


def _weight_files(path: Path, operation: str) -> list[Path]:
    """Return the files of the weights, as transformers and diffusers choose them."""
    there = os.path.lexists
    begin = DIFFUSION * any(there(path / f"{DIFFUSION}{name}") for name in (WEIGHTS, INDEX))
    if there(path / f"{begin}{WEIGHTS}"):
        return [path / f"{begin}{WEIGHTS}"]
    index = f"{begin}{INDEX}"
    if not (path / index).exists():
        pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
        if pickled:
            raise InputError(
                f"{operation}: {path} has weights as {pickled[0]} only, whose format can run code "
                "when it is read; save them as safetensors"
            )
        raise InputError(f"{operation}: {path} has neither {WEIGHTS} nor {INDEX}; copy it again")
    listed = read_json(path / index, operation).get("weight_map")
    names = set(map(str, listed.values())) if isinstance(listed, Mapping) else set()
    bad = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if bad or not names:
        raise InputError(
            f"{operation}: {index} of {path} must name safetensors files that lie beside it, got "
            f"{min(bad, default='none')[:80]!r}; copy the folder again"
        )
    return [path / name for name in sorted(names)]


def check_file(path: Path, operation: str) -> None:
    """Refuse what is missing or no ordinary file, or has a name that no file can have."""
    if not os.path.isfile(path):
        raise InputError(
            f"{operation}: {path} is missing, or no ordinary file; copy the folder again"
        )


def _check_config(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse sizes that no model has, and fields that lead to other files or code."""
    for name, value in fields_of(config):
        if name in DETOURS:
            raise InputError(f"{where} has {name}, which leads to other files; remove it")
        if name.lstrip("_").startswith("attn_implementation") and "/" in str(value):
            raise InputError(f"{where} asks for code of {str(value)[:80]!r}; remove {name}")
        if value is None or isinstance(value, Mapping):
            continue
        must = ""
        if name in DEPTHS and not (_is_size(value) and value <= tensors):
            must = f"a number of layers that {tensors} tensors can make"
        elif name in SIZES:
            many = value if isinstance(value, list | tuple) and value else [value]
            if not all(_is_size(each, float if name == "mlp_ratio" else int) for each in many):
                must = f"a size from 1 to {LARGEST:,}"
        elif isinstance(value, int) and abs(value) >= 2**63:
            must = "a number of a model"
        if must:
            raise InputError(
                f"{where}: {name} must be {must}, got {str(value)[:40]!r}; copy the folder again"
            )


def _is_size(value: Any, kind: type = int) -> bool:
    number = isinstance(value, int | kind) and not isinstance(value, bool)
    return number and 1 <= value <= LARGEST


def fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every field of a config and of its parts, by its own name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from fields_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from fields_of(item)


def check_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the auto classes that load the model of the folder by its own code, which is ours.

    Those of other heads have no weights there, and aren't among them. Refused is a folder with any
    other code, or that names it, or that version 0.1.0 saved.
    """
    mark, auto_map = config["liar"], config.get("auto_map", {})
    if mark["version"] == OLD_MARK_VERSION:
        raise InputError(
            f"verify: {folder} was saved by version 0.1.0, which can only be loaded; load it with "
            "liar_ext.load_pruned and save it again with save_pruned"
        )
    path, code = folder / LOADER_FILE, LOADER_CODE.encode()
    same = path.is_file() and path.stat().st_size == len(code) and path.read_bytes() == code
    ours = same and mark["layers"] == "unequal"  # equal layers need no code
    found = [each for each in sorted(folder.rglob("*.py")) if not (ours and each == path)]
    wrong = [str(each.relative_to(folder)) for each in found]
    if any(key == "auto_map" for part in config.values() for key, _ in fields_of(part)):
        wrong.append("a part of config.json with auto_map")
    for name, loader in auto_map.items() if isinstance(auto_map, Mapping) else [("", auto_map)]:
        module, _, stock = str(loader).partition(".")
        known = name in auto_names() and module == LOADER_MODULE
        if not (ours and known and model_class(stock) is not None):
            wrong.append(f"auto_map with {name}: {str(loader)[:80]}")
    if wrong:
        raise InputError(
            f"verify: {folder} has {wrong[0]}, which save_pruned didn't write; no code of the "
            "folder was run, nor should you trust it: load the weights with liar_ext.load_pruned, "
            "or get the folder again"
        )
    names = config.get("architectures")
    saved = f"{LOADER_MODULE}.{names[0] if isinstance(names, list) and names else ''}"
    return sorted(name for name, loader in auto_map.items() if loader == saved)


def read_marked_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a pruned folder's config, with a mark that this version can read."""
    fields = read_config(folder, "load_pruned")
    if fields.get("liar") is None:
        raise InputError(
            f"load_pruned: {folder} holds a dense model; give a folder that liar prune wrote, load "
            "it with transformers, or save what apply_plan sliced by save_pruned(model, folder, "
            "plan)"
        )
    mark = mapping(fields["liar"])
    version = mark.get("version")
    if version not in (OLD_MARK_VERSION, MARK_VERSION) or isinstance(version, bool):
        raise InputError(
            f"load_pruned: {folder} has version {str(version)[:40]}, not {OLD_MARK_VERSION} or "
            f"{MARK_VERSION}; read it with the liar_ext that wrote it"
        )
    wrong = "" if mark.get("layers") in ("equal", "unequal") else "layers must be equal or unequal"
    for part in ("modules", "head", "head_inputs"):  # before a model is built by them
        is_right = _is_head_input if part == "head_inputs" else _are_sizes
        modules = mark.get(part, {})
        if not isinstance(modules, Mapping) or not all(map(is_right, modules.values())):
            wrong = f"{part} must map modules to sizes up to {LARGEST:,}"
    if wrong:
        raise InputError(f"load_pruned: config.json of {folder}: {wrong}; copy the folder again")
    return fields


def _are_sizes(said: Any) -> bool:
    """Tell whether something maps names to numbers, or to shapes of a few, or of null."""

    def is_size(value: Any) -> bool:
        if isinstance(value, list):
            numbers = [n for n in value if n is not None]
            few = numbers and len(value) < 5
            return bool(few) and all(isinstance(n, int) and is_size(n) for n in numbers)
        return isinstance(value, int | float) and abs(value) <= LARGEST

    return isinstance(said, Mapping) and all(map(is_size, said.values()))


def _is_head_input(said: Any) -> bool:
    """Tell whether something is ``[position, keyword, heads]``, or ``[..., output, table]``."""
    types = (int, str, (list, type(None)), int, str)
    if not isinstance(said, list) or len(said) not in (3, 5):
        return False
    if not all(isinstance(each, kind) for each, kind in zip(said, types, strict=False)):
        return False
    if said[2] is None:
        return len(said) == 5
    return all(isinstance(n, int) and 0 <= n <= LARGEST for n in said[2])


def reach_hub(name: str | os.PathLike[str]) -> None:
    """Raise InputError unless there is a local copy of a model, or the hub answers.

    It is asked once: a download asks six times, which takes 23 seconds where there is no network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    file = os.fspath(name), "config.json"
    with asking_hub(f"load_model: there is no folder {name} here; the hub can't be reached"):
        if not isinstance(try_to_load_from_cache(*file), str):
            get_hf_file_metadata(hf_hub_url(*file))


@contextmanager
def reading(what: Any, operation: str) -> Iterator[None]:
    """Turn whatever transformers raises at a damaged file into one line; errors of memory pass."""
    try:
        yield
    except Exception as error:
        hint = "give a folder, a hub id or a GGUF file that transformers can load"
        if "trust_remote_code" in str(error):
            hint = (
                "it needs code of its own, which liar_ext doesn't run; take a model whose class is "
                "in transformers"
            )
        with refusing(f"{operation}: can't load {what}", hint, Exception, named=True):
            raise


def stock_class(fields: Mapping[str, Any], operation: str) -> Any:
    """Return the class of transformers that a config names, if it is one for that type of model."""
    import transformers

    if CLASS_NAME in fields:
        name = str(fields[CLASS_NAME])[:80]
        if (stock := model_class(name)) is None:
            raise InputError(
                f"{operation}: config.json names {name!r} of diffusers, which isn't installed, or "
                "none of the families; pip install diffusers, or see docs/howto/diffusion.md"
            )
        return stock
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    with reading(name, operation):
        stock = model_class(name)
    if stock is None:
        raise InputError(
            f"{operation}: transformers {transformers.__version__} has no model class "
            f"{str(name)[:80]!r}, which config.json must name in architectures; update "
            "transformers, or take a model that needs no code of its own"
        )
    expected = getattr(stock.config_class, "model_type", None)
    if fields.get("model_type") != expected:
        raise InputError(
            f"{operation}: {name} is of type {expected!r}, config.json says "
            f"{str(fields.get('model_type'))[:80]!r}; copy the folder again"
        )
    return stock
