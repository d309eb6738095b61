"""Where a model keeps what the row of its family names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from torch import nn

from liar_ext.errors import InputError
from liar_ext.models.family import Family


def block_config(family: Family, config: Any) -> Any:
    """Return the part of a model's config that describes the blocks."""
    return get_path(config, family.config) if family.config else config


def get_path(root: Any, path: str) -> Any:
    """Return the attribute of ``root`` at a dotted path."""
    return reduce(getattr, path.split("."), root)


def blocks_of(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each block of a model."""
    path = f"{base_path(model)}{family.blocks}"
    try:
        blocks = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"sites: {type(model).__name__} has no {path!r}, where family {family.name!r} keeps "
            "its blocks; pass the whole model, or register a family that fits"
        ) from error
    for index, block in enumerate(blocks):
        yield f"{path}.{index}", block


def base_path(model: nn.Module) -> str:
    """Return what the paths inside the base model begin with: nothing, or a path and a dot."""
    base = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}." if prefix else ""
