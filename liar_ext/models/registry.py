"""The table of model families."""

from __future__ import annotations

from torch import nn

from liar_ext.errors import InputError
from liar_ext.models.families import bert, gpt, llama, moe, t5, vit
from liar_ext.models.family import Family

# One row a family, checked against the source of transformers 5.24 and by a test that slicing
# equals zeroing.
_MODULES = (llama, gpt, bert, t5, vit, moe)
FAMILIES: dict[str, Family] = {row.name: row for module in _MODULES for row in module.ROWS}


def register_family(family: Family) -> Family:
    """Add a family to the table, or replace the row of that name, and return it.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from liar_ext import register_family
    >>> from liar_ext.models.registry import family_of
    >>> register_family(replace(family_of(llama), name="my_llama"))  # doctest: +SKIP
    """
    FAMILIES[family.name] = family
    return family


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, by its ``config.model_type``.

    InputError is raised if the model has no config, or the table has no such family.
    """
    name = getattr(getattr(model, "config", None), "model_type", None)
    if name in FAMILIES:
        return FAMILIES[name]
    raise InputError(
        f"sites: unknown architecture {name!r} ({type(model).__name__}), which is none of the "
        f"{len(FAMILIES)} that `liar families` lists; `liar families --suggest MODEL`, or "
        "liar_ext.suggest_family(model), looks for a row and proves it; liar_ext.register_family "
        "adds one that you write: see docs/extend.md"
    )
