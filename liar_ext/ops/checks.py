"""The rules for arguments of the operators, for where no compiled launcher holds them.

The words are those of csrc/launchers. Each raises RuntimeError, as the launchers do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SUMS = FLOATS[2:]
WEIGHTS = (torch.bool, *SUMS)


def check_gram_update(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Hold the rules of ``gram_update_``, and tell autograd that the sums change."""
    named = {"gram": gram, "total": total, "count": count, "x": x, "y": y, "weight": weight}
    _rule(
        total.dim() == 1 and total.is_contiguous(),
        f"gram_update_: total must be (d,) and contiguous, got {_shape(total)}",
    )
    d = len(total)
    _rule(
        x.dim() == 2 and x.shape[1] == d,
        f"gram_update_: x must be (tokens, {d}), got {_shape(x)}; flatten batch and sequence first",
    )
    tokens, columns = len(x), d
    if y is not None:
        _rule(
            y.dim() == 2 and len(y) == tokens,
            f"gram_update_: y must be ({tokens}, dy), got {_shape(y)}; give one row per row of x",
        )
        _rule(y.dtype == x.dtype, "gram_update_: y must have the dtype of x; convert it first")
        columns = y.shape[1]
    _rule(
        gram.dim() == 2 and gram.shape == (d, columns),
        f"gram_update_: gram must be ({d}, {columns}), got {_shape(gram)}",
    )
    _rule(
        (columns <= 1 or gram.stride(1) == 1) and (d <= 1 or gram.stride(0) >= columns),
        "gram_update_: gram must have contiguous columns and rows that do not overlap; allocate it "
        "with torch.zeros",
    )
    _rule(
        gram.dtype in SUMS and gram.dtype == total.dtype,
        "gram_update_: gram and total must both be float32 or both be float64",
    )
    _rule(
        count.shape == (2,) and count.dtype == torch.float64 and count.is_contiguous(),
        f"gram_update_: count must be (2,) float64 and contiguous, got {_shape(count)}",
    )
    _rule(
        x.dtype in FLOATS,
        "gram_update_: x must be float16, bfloat16, float32 or float64; convert it first",
    )
    if weight is not None:
        _rule(
            weight.dim() == 1 and len(weight) == tokens,
            f"gram_update_: weight must be ({tokens},), got {_shape(weight)}; give one weight per "
            "row of x",
        )
        _rule(
            weight.dtype in WEIGHTS,
            "gram_update_: weight must be bool, float32 or float64; convert it first",
        )
    _same_device("gram_update_", "x", **named)
    for name, before in (("gram", "total"), ("gram", "count"), ("total", "count")):
        _apart(name, named[name], before, named[before])
    for name in ("gram", "total", "count"):
        for other in ("x", "y", "weight"):
            _apart(name, named[name], other, named[other])
        _rule(
            not named[name].requires_grad and not named[name].is_inference(),
            f"gram_update_: {name} must be a tensor that may be written in place; detach or clone "
            "one that requires a gradient or was made in inference mode",
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
) -> None:
    """Hold the rules of ``reconstruct`` that need no value of a tensor."""
    lead = weight.shape[:-2]
    _rule(
        weight.dim() in (2, 3) and weight.dtype in FLOATS,
        f"reconstruct: weight must be a float tensor (d_out, d), or (sites, d_out, d), got "
        f"{_shape(weight)}",
    )
    d_out, d = weight.shape[-2:]
    for name, one in (("gram", gram), ("holdout", holdout)):
        _rule(
            one is None or one.shape == (*lead, d, d),
            f"reconstruct: {name} must be {_shape((*lead, d, d))}, got {_shape(one)}; give the "
            "moments of the layer that weight is of",
        )
        _rule(
            one is None or one.dtype in SUMS,
            f"reconstruct: {name} must be float32 or float64; convert it first",
        )
        if name == "holdout":
            continue
        wanted = "(sites, n)" if lead else "(n,)"
        _rule(
            kept.dim() == 1 + len(lead)
            and kept.dtype == torch.int64
            and kept.shape[:-1] == lead
            and (kept.shape[-1] <= 1 or kept.stride(-1) == 1),
            f"reconstruct: kept must be {wanted} int64 and contiguous, got {_shape(kept)}",
        )
        _rule(
            damps.dim() == 1 and damps.dtype == torch.float64 and damps.is_contiguous(),
            f"reconstruct: damps must be (L,) float64 and contiguous, got {_shape(damps)}",
        )
    for name, one in (("cross", cross), ("holdout_cross", holdout_cross)):
        _rule(
            one is None or one.shape == (*lead, d, d_out),
            f"reconstruct: {name} must be {_shape((*lead, d, d_out))}, got {_shape(one)}",
        )
        _rule(
            one is None or one.dtype in FLOATS,
            f"reconstruct: {name} must be a float tensor; convert it first",
        )
    _rule(
        (holdout_cross is not None) == (holdout is not None and cross is not None),
        "reconstruct: holdout_cross must be given exactly when both holdout and cross are",
    )
    others = {"gram": gram, "kept": kept, "damps": damps, "holdout": holdout, "cross": cross}
    _same_device("reconstruct", "weight", weight=weight, holdout_cross=holdout_cross, **others)


def check_values(weight: Tensor, kept: Tensor, damps: Tensor) -> None:
    """Hold the rules of ``reconstruct`` for indices and λ, whose values are waited for."""
    d = weight.shape[-1]
    for row in kept.tolist() if kept.dim() == 2 else [kept.tolist()]:
        for k, index in enumerate(row):
            _rule(
                0 <= index < d,
                f"reconstruct: kept must index {d} features, got {index} at position {k}",
            )
            _rule(
                k == 0 or row[k - 1] < index,
                f"reconstruct: kept must be strictly ascending, got {row[k - 1]} before {index}; "
                "sort it and drop duplicates",
            )
    for k, damp in enumerate(damps.tolist()):
        _rule(
            damp >= 0,
            f"reconstruct: damps must be at least 0, got {damp:g} at position {k}; use infinity "
            "for plain dropping",
        )


def check_obs_curve(
    weight: Tensor, gram: Tensor, width: int, damp: float, at_least: int, groups: int = 1
) -> None:
    """Hold the rules of ``obs_curve``."""
    _rule(
        weight.dim() == 2 and weight.dtype in FLOATS,
        f"obs_curve: weight must be a float tensor (d_out, d), got {_shape(weight)}",
    )
    d = weight.shape[1]
    _rule(
        gram.shape == (d, d),
        f"obs_curve: gram must be ({d}, {d}), got {_shape(gram)}; give the moments of the layer "
        "that weight is of",
    )
    _rule(gram.dtype in SUMS, "obs_curve: gram must be float32 or float64; convert it first")
    _rule(
        width >= 1 and d > 0 and d % width == 0,
        f"obs_curve: width must divide the {d} features, got {width}; it is the number of features "
        "per unit",
    )
    units = d // width
    _rule(
        groups >= 1 and units % groups == 0,
        f"obs_curve: groups must divide the {units} units, got {groups}",
    )
    _rule(
        0 <= at_least <= units and at_least % groups == 0,
        f"obs_curve: at_least must be a multiple of groups from 0 to {units}, got {at_least}",
    )
    _rule(
        damp >= 0 and math.isfinite(damp),
        f"obs_curve: damp must be finite and at least 0, got {damp:g}; 1e-3 is a good start",
    )
    _same_device("obs_curve", "weight", weight=weight, gram=gram)


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _shape(tensor: Tensor | tuple | None) -> str:
    return str(tuple(getattr(tensor, "shape", tensor) or ()))


def _same_device(op: str, first: str, **tensors: Tensor | None) -> None:
    device = tensors[first].device
    for name, tensor in tensors.items():
        _rule(
            tensor is None or tensor.device == device,
            f"{op}: {name} must be on the {device.type.upper()} device of {first}; move it with "
            ".to(device)"
            if device.type != "cpu"
            else f'{op}: {name} must be on the CPU, as {first} is; move it with .to("cpu")',
        )


def _apart(name: str, written: Tensor, other_name: str, other: Tensor | None) -> None:
    """Refuse memory that a tensor which is written shares with another."""
    if other is None or written.numel() == 0 or other.numel() == 0:
        return

    def ends(tensor: Tensor) -> tuple[int, int]:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        begin = tensor.data_ptr()
        return begin, begin + (last + 1) * tensor.element_size()

    (begin, end), (other_begin, other_end) = ends(written), ends(other)
    _rule(
        end <= other_begin or other_end <= begin,
        f"gram_update_: {name} must have memory of its own, but shares some with {other_name}; "
        "clone one of them",
    )
