"""Which unit each row of a producer belongs to, also where one weight stacks several matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.models.family import Stack, Wiring


def row_units(
    stack: Stack | None, rows: int, units: int, width: int, kv_heads: int, keys_stay: bool
) -> Tensor:
    """Return the unit of each row of a producer, shape (rows,), int64; -1 of rows that no unit has.

    Those are the rows of keys and values where query heads leave without them.

    Parameters
    ----------
    stack : Stack or None
        What the weight stacks; None for one matrix, with equally many rows per unit.
    rows : int
        Rows of the weight.
    units, width : int
        Units of the site, and the consumer's input features of each: the rows per unit in a matrix
        of queries or channels.
    kv_heads : int
        Key/value heads; 0 for an MLP.
    keys_stay : bool
        Whether units are query heads that share keys and values.
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
