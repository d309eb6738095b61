"""The table of model families, and what its words say of the rows of a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.models.families import bert, gpt, llama, moe, t5, vit
from liar_ext.models.family import Family, Stack, Wiring

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

    Raises
    ------
    InputError
        If the model has no config, or the table has no such family.
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


def row_units(
    stack: Stack | None, rows: int, units: int, width: int, kv_heads: int, keys_stay: bool
) -> Tensor:
    """Return the unit of each row of a producer, shape (rows,), int64; -1 of rows that no unit has.

    Those are the rows of keys and values where query heads leave without them (``keys_stay``).
    The weight holds one matrix, with equally many rows per unit, or a ``stack`` of several, of
    which those of queries or channels have ``width`` rows per unit. ``kv_heads`` is 0 for an MLP.
    """
    if stack is None:
        return _runs(rows, units)
    own = _runs(units * width, units)
    shared = _runs(_shared_rows(stack, rows, units * width), 1 if keys_stay else units)
    if keys_stay:
        shared -= 1
    groups = (kv_heads or units) if stack.by_group else 1
    parts = [shared if matrix in ("key", "value") else own for matrix in stack.matrices]
    return torch.cat([part.view(groups, -1) for part in parts], dim=1).flatten()


def kv_heads_of(
    site: str, wiring: Wiring, rows: Mapping[str, int], heads: int, head_dim: int
) -> int:
    """Return the number of key/value heads, by the rows of the layers of an attention site.

    Raises
    ------
    InputError
        If a weight has more or fewer rows than what it stacks.
    """
    if wiring.key_value:
        return rows[wiring.key_value[0]] // head_dim
    for layer, stack in wiring.stacked.items():
        if stack.shared:
            each = _shared_rows(stack, rows[layer], heads * head_dim)
            kv_heads = each // head_dim
            own = (len(stack.matrices) - stack.shared) * heads * head_dim
            if own + stack.shared * kv_heads * head_dim != rows[layer] or not kv_heads:
                raise InputError(
                    f"sites: {layer} of {site} must stack {', '.join(stack.matrices)} of {heads} "
                    f"query heads of {head_dim} rows, got {rows[layer]} rows; register a family "
                    "that fits"
                )
            return kv_heads
    return heads


def _shared_rows(stack: Stack, rows: int, own: int) -> int:
    """Return the rows of each matrix of keys or values, where each other one has ``own``."""
    left = rows - (len(stack.matrices) - stack.shared) * own
    return left // stack.shared if stack.shared else 0


def _runs(rows: int, units: int) -> Tensor:
    """Return the unit of each row where every unit has one run of rows."""
    # On the CPU also while a model is built on the meta device.
    return torch.arange(units, device="cpu").repeat_interleave(rows // units)
