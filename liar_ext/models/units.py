"""How large the layers of a site are, and how their rows fall into units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.models.family import Wiring


def attn_units(attn_unit: str, heads: int, kv_heads: int) -> tuple[str, int, int]:
    """Return the unit of attention, how many there are, and in how many equal runs."""
    grouped = kv_heads < heads
    if attn_unit == "head" or (attn_unit == "auto" and not grouped):
        return "head", heads, kv_heads if grouped else 1
    return "kv_group", kv_heads, 1


def out_in(site: str, path: str, layer: Any, wiring: Wiring) -> tuple[int, int]:
    """Return how many features a linear layer writes, and how many it reads."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            f"sites: {path} of {site} must be a linear layer with floating-point weights, got "
            f"{type(layer).__name__}; load the model dequantised"
        )
    return tuple(weight.shape[::-1] if wiring.transposed else weight.shape)


def count_kv_heads(site: str, wiring: Wiring, rows: Mapping[str, int], sizes: Sequence[int]) -> int:
    """Return the number of key/value heads, by the rows of the layers of an attention site.

    ``sizes`` are the number of query heads, the size of a head, and that of a key head.
    """
    heads, head_dim, key_dim = sizes
    if wiring.key_value:
        return rows[wiring.key_value[0]] // head_dim
    for layer, stack in wiring.stacked.items():
        if stack.shared and layer in rows:
            each = stack.rows(rows[layer], heads * head_dim, heads)
            kv_heads, left = divmod(min(each[m] for m in stack.grouped if m in each), key_dim)
            if sum(each.values()) != rows[layer] or left or kv_heads < 1:
                raise InputError(
                    f"sites: {layer} of {site} must stack {', '.join(stack.matrices)} of {heads} "
                    f"query heads of {head_dim} rows, got {rows[layer]} rows; register a family "
                    "that fits"
                )
            return kv_heads
    return heads


def runs(rows: int, units: int) -> Tensor:
    """Return the unit of each row where every unit has one run of rows."""
    # On the CPU also while a model is built on the meta device.
    return torch.arange(units, device="cpu").repeat_interleave(rows // units)
