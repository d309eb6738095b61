"""The rules for arguments of the operators, for where no compiled launcher holds them.

The words are those of csrc/launchers. Each raises RuntimeError, as the launchers do.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SUMS = FLOATS[2:]


def check_gram_update(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Hold the rules of ``gram_update_``, and tell autograd that the sums change."""
    rule = partial(_rule, "gram_update_")
    flat = total.dim() == 1 and total.is_contiguous()
    rule(flat, f"total must be (d,) and contiguous, got {_shape(total)}")
    d = columns = len(total)
    rule(
        x.dim() == 2 and x.shape[1] == d,
        f"x must be (tokens, {d}), got {_shape(x)}; flatten batch and sequence first",
    )
    tokens = len(x)
    if y is not None:
        rule(
            y.dim() == 2 and len(y) == tokens,
            f"y must be ({tokens}, dy), got {_shape(y)}; give one row per row of x",
        )
        rule(y.dtype == x.dtype, "y must have the dtype of x; convert it first")
        columns = y.shape[1]
    rule(gram.shape == (d, columns), f"gram must be ({d}, {columns}), got {_shape(gram)}")
    rule(
        (columns <= 1 or gram.stride(1) == 1) and (d <= 1 or gram.stride(0) >= columns),
        "gram must have contiguous columns and rows that do not overlap; allocate it with "
        "torch.zeros",
    )
    both = gram.dtype in SUMS and gram.dtype == total.dtype
    rule(both, "gram and total must both be float32 or both be float64")
    two = count.shape == (2,) and count.dtype == torch.float64 and count.is_contiguous()
    rule(two, f"count must be (2,) float64 and contiguous, got {_shape(count)}")
    rule(x.dtype in FLOATS, "x must be float16, bfloat16, float32 or float64; convert it first")
    if weight is not None:
        rule(
            weight.shape == (tokens,),
            f"weight must be ({tokens},), got {_shape(weight)}; give one weight per row of x",
        )
        known = weight.dtype in (torch.bool, *SUMS)
        rule(known, "weight must be bool, float32 or float64; convert it first")
    written = {"gram": gram, "total": total, "count": count}
    read = {"x": x, "y": y, "weight": weight}
    same_device("gram_update_", "x", **written, **read)
    for index, (name, one) in enumerate(written.items()):
        for other in (*list(written)[index + 1 :], *read):
            rule(
                _apart(one, {**written, **read}[other]),
                f"{name} must have memory of its own, but shares some with {other}; clone one of "
                "them",
            )
        rule(
            not one.requires_grad and not one.is_inference(),
            f"{name} must be a tensor that may be written in place; detach or clone one that "
            "requires a gradient or was made in inference mode",
        )
    torch.autograd.graph.increment_version((gram, total, count))


def check_reconstruct(
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    damps: Tensor,
    holdout: Tensor | None = None,
    cross: Tensor | None = None,
    holdout_cross: Tensor | None = None,
    errors_only: bool = False,
    *,
    values: bool = True,
) -> None:
    """Hold the rules of ``reconstruct``: without ``values`` those that wait for none."""
    rule, lead = partial(_rule, "reconstruct"), tuple(weight.shape[:-2])
    rule(
        weight.dim() in (2, 3) and weight.dtype in FLOATS,
        f"weight must be a float tensor (d_out, d), or (sites, d_out, d), got {_shape(weight)}",
    )
    d_out, d = weight.shape[-2:]

    def matrix(name: str, one: Tensor | None, shape: tuple, dtypes: tuple, hint: str) -> None:
        if one is not None:
            rule(one.shape == shape, f"{name} must be {shape}, got {_shape(one)}{hint}")
            what = "float32 or float64" if dtypes is SUMS else "a float tensor"
            rule(one.dtype in dtypes, f"{name} must be {what}; convert it first")

    hint = "; give the moments of the layer that weight is of"
    matrix("gram", gram, (*lead, d, d), SUMS, hint)
    wanted = "(sites, n)" if lead else "(n,)"
    rule(
        kept.shape[:-1] == lead
        and kept.dim() == 1 + len(lead)
        and kept.dtype == torch.int64
        and (kept.shape[-1] <= 1 or kept.stride(-1) == 1),
        f"kept must be {wanted} int64 and contiguous, got {_shape(kept)}",
    )
    rule(
        damps.dim() == 1 and damps.dtype == torch.float64 and damps.is_contiguous(),
        f"damps must be (L,) float64 and contiguous, got {_shape(damps)}",
    )
    matrix("holdout", holdout, (*lead, d, d), SUMS, hint)
    matrix("cross", cross, (*lead, d, d_out), FLOATS, "")
    matrix("holdout_cross", holdout_cross, (*lead, d, d_out), FLOATS, "")
    rule(
        (holdout_cross is not None) == (holdout is not None and cross is not None),
        "holdout_cross must be given exactly when both holdout and cross are",
    )
    others = {"gram": gram, "kept": kept, "damps": damps, "holdout": holdout, "cross": cross}
    same_device("reconstruct", "weight", weight=weight, holdout_cross=holdout_cross, **others)
    if not values:
        return
    for row in kept.tolist() if lead else [kept.tolist()]:
        for k, index in enumerate(row):
            inside = 0 <= index < d
            rule(inside, f"kept must index {d} features, got {index} at position {k}")
            rule(
                k == 0 or row[k - 1] < index,
                f"kept must be strictly ascending, got {row[k - 1]} before {index}; sort it and "
                "drop duplicates",
            )
    for k, damp in enumerate(damps.tolist()):
        rule(
            damp >= 0,
            f"damps must be at least 0, got {damp:g} at position {k}; use infinity for plain "
            "dropping",
        )


def check_obs_curve(
    weight: Tensor, gram: Tensor, width: int, damp: float, at_least: int, groups: int = 1
) -> None:
    """Hold the rules of ``obs_curve``."""
    rule = partial(_rule, "obs_curve")
    rule(
        weight.dim() == 2 and weight.dtype in FLOATS,
        f"weight must be a float tensor (d_out, d), got {_shape(weight)}",
    )
    d = weight.shape[1]
    rule(
        gram.shape == (d, d),
        f"gram must be ({d}, {d}), got {_shape(gram)}; give the moments of the layer that weight "
        "is of",
    )
    rule(gram.dtype in SUMS, "gram must be float32 or float64; convert it first")
    rule(
        width >= 1 and d > 0 and d % width == 0,
        f"width must divide the {d} features, got {width}; it is the number of features per unit",
    )
    units = d // width
    equal = groups >= 1 and units % groups == 0
    rule(equal, f"groups must divide the {units} units, got {groups}")
    rule(
        0 <= at_least <= units and at_least % groups == 0,
        f"at_least must be a multiple of groups from 0 to {units}, got {at_least}",
    )
    rule(
        damp >= 0 and math.isfinite(damp),
        f"damp must be finite and at least 0, got {damp:g}; 1e-3 is a good start",
    )
    same_device("obs_curve", "weight", weight=weight, gram=gram)


def same_device(op: str, first: str, **tensors: Tensor | None) -> None:
    """Refuse tensors of several devices, of which torch picks the kernel of one."""
    device = tensors[first].device
    where, to = f"the {device.type.upper()} device of {first}", "device"
    if device.type == "cpu":
        where, to = f"the CPU, as {first} is", '"cpu"'
    for name, tensor in tensors.items():
        same = tensor is None or tensor.device == device
        _rule(op, same, f"{name} must be on {where}; move it with .to({to})")


def _rule(op: str, holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"{op}: {message}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _apart(one: Tensor, other: Tensor | None) -> bool:
    """Tell whether two tensors share no memory."""
    if other is None or one.numel() == 0 or other.numel() == 0:
        return True

    def ends(tensor: Tensor) -> tuple[int, int]:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        begin = tensor.data_ptr()
        return begin, begin + (last + 1) * tensor.element_size()

    (begin, end), (other_begin, other_end) = ends(one), ends(other)
    return end <= other_begin or other_end <= begin
