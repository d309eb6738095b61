"""Whether the code in a folder is the code that ``save_pruned`` writes, which alone is ever run.

Compared are the bytes of the file, and every place from which a loader could be sent elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.inspection import fields_of
from liar_ext.checkpoint.names import LOADER_CODE, LOADER_FILE, LOADER_MODULE, OLD_MARK_VERSION
from liar_ext.checkpoint.stock_config import auto_names
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
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    others = [name for name in found if not (unequal and name == LOADER_FILE)]
    if others:
        raise _refusal(folder, others[0], "save_pruned doesn't write it")
    if any(key == "auto_map" for part in config.values() for key, _ in fields_of(part)):
        raise _refusal(folder, "a part of config.json with auto_map", "save_pruned writes none")
    if not unequal:
        if "auto_map" in config:
            raise _refusal(folder, "auto_map", "equal layers need no code")
        return []
    for name, loader in auto_map.items() if isinstance(auto_map, Mapping) else [("", auto_map)]:
        if name not in auto_names() or not _is_stock(loader):
            raise _refusal(folder, f"auto_map with {name}: {str(loader)[:80]}", "it isn't ours")
    path, code = folder / LOADER_FILE, LOADER_CODE.encode()
    same = path.is_file() and path.stat().st_size == len(code) and path.read_bytes() == code
    if auto_map and not same:
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
