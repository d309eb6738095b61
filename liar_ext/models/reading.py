"""Where a model keeps what the row of its family names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import nn

from liar_ext.errors import InputError
from liar_ext.models.family import Family, Part

Block = tuple[str, nn.Module]


def block_config(family: Family | Part, config: Any) -> Any:
    """Return the part of a model's config that describes the blocks."""
    return get_path(config, family.config) if family.config else config


def config_parts(config: Any) -> list[Any]:
    """Return a config, and those of its parts that are configs and there."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if part is not None)]


def get_path(root: Any, path: str) -> Any:
    """Return the attribute of ``root`` at a dotted path."""
    return reduce(getattr, path.split("."), root)


def parts_of(model: nn.Module, family: Family) -> list[tuple[Part, list[Block]]]:
    """Return those parts of a family that a model has, with path and module of each block."""
    base = base_path(model)
    found = [
        (part, blocks)
        for part in family.all_parts
        if (blocks := list(_expand(model, base + part.blocks)))
    ]
    if not found:
        paths = " or ".join(repr(base + part.blocks) for part in family.all_parts)
        raise InputError(
            f"sites: {type(model).__name__} has no {paths}, where family {family.name!r} keeps "
            "its blocks; pass the whole model, or register a family that fits"
        )
    if len(found) == 1 and family.parts:
        # Alone, it reads the main input of the model, whose mask has the usual name.
        (part, blocks) = found[0]
        found = [(replace(part, input="", mask=part.mask and "attention_mask"), blocks)]
    return found


def blocks_of(model: nn.Module, family: Family) -> Iterator[Block]:
    """Yield path and module of each block of a model."""
    for _, blocks in parts_of(model, family):
        yield from blocks


def _expand(model: nn.Module, path: str) -> Iterator[Block]:
    """Yield the modules of a list, or of the lists that a ``*`` in its path stands for."""
    first, star, rest = path.partition(".*.")
    try:
        children = model.get_submodule(first)
    except AttributeError:
        return
    for index, child in enumerate(children):
        if star:
            yield from _expand(model, f"{first}.{index}.{rest}")
        else:
            yield f"{first}.{index}", child


def base_path(model: nn.Module) -> str:
    """Return what the paths inside the base model begin with: nothing, or a path and a dot."""
    base = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}." if prefix else ""


def body_of(model: nn.Module) -> nn.Module:
    """Return what to run where no head is needed: the base model, if it takes the batch itself."""
    base = getattr(model, "base_model", model)
    name = getattr(model, "main_input_name", "input_ids")
    # What DINOv3 calls its base model is the stack of blocks alone.
    return base if name in inspect.signature(base.forward).parameters else model
