"""Whether the code in a folder is the code that ``save_pruned`` writes.

Only such code is ever run, by ``verify_pruned`` alone. What is compared is all of it: the bytes of
the file, and every place from which a loader could be sent to another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.names import LOADER_CODE, LOADER_FILE, LOADER_MODULE, OLD_MARK_VERSION
from liar_ext.errors import InputError


def check_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the auto classes that load the model of the folder by its own code, which is ours.

    Those of other heads have no weights there, and aren't among them.

    Raises
    ------
    InputError
        If the folder has any other code, or names it, or version 0.1.0 saved it.
    """
    if config["liar"]["version"] == OLD_MARK_VERSION:
        raise InputError(
            f"verify: {folder} was saved by version 0.1.0, which can only be loaded; load it with "
            "liar_ext.load_pruned and save it again with save_pruned"
        )
    auto_map = config.get("auto_map", {})
    unequal = config["liar"]["layers"] == "unequal"
    others = [
        name
        for name in sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
        if not (unequal and name == LOADER_FILE)
    ]
    if others:
        raise _refusal(folder, others[0], "save_pruned doesn't write it")
    if any(key == "auto_map" for part in config.values() for key in _keys(part)):
        raise _refusal(folder, "a part of config.json with auto_map", "save_pruned writes none")
    if not unequal:
        if auto_map or "auto_map" in config:
            raise _refusal(folder, "auto_map", "equal layers need no code")
        return []
    known = _auto_names()
    for name, loader in auto_map.items() if isinstance(auto_map, Mapping) else [("", auto_map)]:
        if name not in known or not _is_stock(loader):
            raise _refusal(folder, f"auto_map with {name}: {str(loader)[:80]}", "it isn't ours")
    path, code = folder / LOADER_FILE, LOADER_CODE.encode()
    if auto_map and not (
        path.is_file() and path.stat().st_size == len(code) and path.read_bytes() == code
    ):
        raise _refusal(folder, LOADER_FILE, "it isn't the file that save_pruned writes")
    names = config.get("architectures")
    saved = f"{LOADER_MODULE}.{names[0] if isinstance(names, list) and names else ''}"
    return sorted(name for name, loader in auto_map.items() if loader == saved)


def _refusal(folder: Path, what: str, why: str) -> InputError:
    return InputError(
        f"verify: {folder} has {what}, and {why}; no code of the folder was run, nor should you "
        "trust it: load the weights with liar_ext.load_pruned, or get the folder again"
    )


def _is_stock(loader: Any) -> bool:
    """Tell whether this is the loader file's class for a class of transformers."""
    import transformers

    module, _, name = str(loader).partition(".")
    stock = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)
    return module == LOADER_MODULE and is_model


def _auto_names() -> set[str]:
    from transformers.models.auto import modeling_auto

    return {name for name in dir(modeling_auto) if name.startswith("AutoModel")}


def _keys(value: Any) -> list[str]:
    """Return all keys of nested mappings."""
    if isinstance(value, Mapping):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    if isinstance(value, list):
        return [key for item in value for key in _keys(item)]
    return []
