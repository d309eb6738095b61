"""What the operators do where they have no kernel: shapes alone, or plain torch.

The rules for arguments hold where no compiled launcher holds them, in its words. Each raises
RuntimeError, as the launchers of csrc do.

Importing this module loads the extension, which registers the operators and their kernels. Where it
cannot be loaded, or ``LIAR_REFERENCE=1`` is in the environment, the operators are registered here.
A device without kernels is served by plain torch, after one warning.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from functools import partial

import torch
from torch import Tensor

from liar_ext.ops import reference
from liar_ext.system.errors import one_line

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SUMS = FLOATS[2:]
SCHEMAS = (
    "gram_update_(Tensor(a!) gram, Tensor(b!) total, Tensor(c!) count, Tensor x, "
    "Tensor? y=None, Tensor? weight=None) -> ()",
    "reconstruct(Tensor weight, Tensor gram, Tensor kept, Tensor damps, Tensor? holdout=None, "
    "Tensor? cross=None, Tensor? holdout_cross=None, bool errors_only=False) -> "
    "(Tensor weight, Tensor error, Tensor holdout_error, Tensor info)",
    "obs_curve(Tensor weight, Tensor gram, int width, float damp, int at_least, int groups=1) -> "
    "(Tensor order, Tensor error, Tensor info)",
)


def _load() -> str:
    """Load the extension; return why there is none, or nothing."""
    if os.environ.get("LIAR_REFERENCE") == "1":
        return "LIAR_REFERENCE=1 asks for plain torch"
    try:
        from liar_ext import _C  # noqa: F401  importing it registers the operators
    except ImportError as error:
        absent = importlib.util.find_spec("liar_ext._C") is None
        return "it was not compiled when this was installed" if absent else one_line(error)
    return ""


MISSING = _load()
library = torch.library.Library("liar_ext", "DEF" if MISSING else "IMPL")
if MISSING:
    for _schema in SCHEMAS:
        library.define(_schema)


def check_gram_update(gram, total, count, x, y=None, weight=None) -> None:
    """Hold the rules of ``gram_update_``, and tell autograd that the sums change."""
    rule, shaped = partial(_rule, "gram_update_"), partial(_shaped, "gram_update_")
    shaped("total", total, total.dim() == 1 and total.is_contiguous(), "(d,) and contiguous")
    d = columns = len(total)
    flat = x.dim() == 2 and x.shape[1] == d
    shaped("x", x, flat, f"(tokens, {d})", "; flatten batch and sequence first")
    tokens = len(x)
    if y is not None:
        rows = y.dim() == 2 and len(y) == tokens
        shaped("y", y, rows, f"({tokens}, dy)", "; give one row per row of x")
        rule(y.dtype == x.dtype, "y must have the dtype of x; convert it first")
        columns = y.shape[1]
    shaped("gram", gram, gram.shape == (d, columns), f"({d}, {columns})")
    apart = (columns <= 1 or gram.stride(1) == 1) and (d <= 1 or gram.stride(0) >= columns)
    hint = "contiguous columns and rows that do not overlap; allocate it with torch.zeros"
    rule(apart, f"gram must have {hint}")
    both = gram.dtype in SUMS and gram.dtype == total.dtype
    rule(both, "gram and total must both be float32 or both be float64")
    two = count.shape == (2,) and count.dtype == torch.float64 and count.is_contiguous()
    shaped("count", count, two, "(2,) float64 and contiguous")
    rule(x.dtype in FLOATS, "x must be float16, bfloat16, float32 or float64; convert it first")
    if weight is not None:
        each = weight.shape == (tokens,)
        shaped("weight", weight, each, f"({tokens},)", "; give one weight per row of x")
        known = weight.dtype in (torch.bool, *SUMS)
        rule(known, "weight must be bool, float32 or float64; convert it first")
    written = {"gram": gram, "total": total, "count": count}
    tensors = written | {"x": x, "y": y, "weight": weight}
    same_device("gram_update_", "x", **tensors)
    for index, (name, one) in enumerate(written.items()):
        for other in list(tensors)[index + 1 :]:
            hint = f"memory of its own, but shares some with {other}; clone one of them"
            rule(_apart(one, tensors[other]), f"{name} must have {hint}")
        hint = "detach or clone one that requires a gradient or was made in inference mode"
        free = not one.requires_grad and not one.is_inference()
        rule(free, f"{name} must be a tensor that may be written in place; {hint}")
    torch.autograd.graph.increment_version((gram, total, count))


def check_reconstruct(
    weight, gram, kept, damps, holdout=None, cross=None, holdout_cross=None, *_, values: bool = True
) -> None:
    """Hold the rules of ``reconstruct``: without ``values`` those that wait for none."""
    rule, shaped = partial(_rule, "reconstruct"), partial(_shaped, "reconstruct")
    lead = tuple(weight.shape[:-2])
    matrix = weight.dim() in (2, 3) and weight.dtype in FLOATS
    shaped("weight", weight, matrix, "a float tensor (d_out, d), or (sites, d_out, d)")
    d_out, d = weight.shape[-2:]
    others = {"gram": gram, "kept": kept, "damps": damps, "holdout": holdout, "cross": cross}
    square, wide = (*lead, d, d), (*lead, d, d_out)
    hint = "; give the moments of the layer that weight is of"
    _check_matrix("gram", gram, square, SUMS, hint)
    indices = kept.shape[:-1] == lead and kept.dim() == 1 + len(lead) and kept.dtype == torch.int64
    indices = indices and (kept.shape[-1] <= 1 or kept.stride(-1) == 1)
    shaped("kept", kept, indices, f"{'(sites, n)' if lead else '(n,)'} int64 and contiguous")
    ladder = damps.dim() == 1 and damps.dtype == torch.float64 and damps.is_contiguous()
    shaped("damps", damps, ladder, "(L,) float64 and contiguous")
    _check_matrix("holdout", holdout, square, SUMS, hint)
    _check_matrix("cross", cross, wide, FLOATS)
    _check_matrix("holdout_cross", holdout_cross, wide, FLOATS)
    rule(
        (holdout_cross is not None) == (holdout is not None and cross is not None),
        "holdout_cross must be given exactly when both holdout and cross are",
    )
    same_device("reconstruct", "weight", weight=weight, holdout_cross=holdout_cross, **others)
    for row in (kept.tolist() if lead else [kept.tolist()]) if values else ():
        for k, index in enumerate(row):
            rule(0 <= index < d, f"kept must index {d} features, got {index} at position {k}")
            hint = f"got {row[k - 1]} before {index}; sort it and drop duplicates"
            rule(k == 0 or row[k - 1] < index, f"kept must be strictly ascending, {hint}")
    for k, damp in enumerate(damps.tolist() if values else ()):
        hint = f"got {damp:g} at position {k}; use infinity for plain dropping"
        rule(damp >= 0, f"damps must be at least 0, {hint}")


def check_obs_curve(weight, gram, width, damp, at_least, groups=1) -> None:
    """Hold the rules of ``obs_curve``."""
    rule = partial(_rule, "obs_curve")
    matrix = weight.dim() == 2 and weight.dtype in FLOATS
    _shaped("obs_curve", "weight", weight, matrix, "a float tensor (d_out, d)")
    d = weight.shape[1]
    hint = "; give the moments of the layer that weight is of"
    _shaped("obs_curve", "gram", gram, gram.shape == (d, d), f"({d}, {d})", hint)
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


def same_device(op: str, first: str, **arguments: object) -> None:
    """Refuse tensors of several devices, of which torch picks the kernel of one."""
    device = arguments[first].device
    where, to = f"the {device.type.upper()} device of {first}", "device"
    if device.type == "cpu":
        where, to = f"the CPU, as {first} is", '"cpu"'
    for name, one in arguments.items():
        same = not isinstance(one, Tensor) or one.device == device
        _rule(op, same, f"{name} must be on {where}; move it with .to({to})")


def _rule(op: str, holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"{op}: {message}")


def _shaped(op: str, name: str, tensor: Tensor, holds: bool, must: str, hint: str = "") -> None:
    _rule(op, holds, f"{name} must be {must}, got {tuple(tensor.shape)}{hint}")


def _check_matrix(
    name: str, one: Tensor | None, shape: tuple, dtypes: tuple, hint: str = ""
) -> None:
    """Hold the rules of ``reconstruct`` for sums, if there are any."""
    if one is not None:
        _shaped("reconstruct", name, one, one.shape == shape, f"{shape}", hint)
        what = "float32 or float64" if dtypes is SUMS else "a float tensor"
        _rule("reconstruct", one.dtype in dtypes, f"{name} must be {what}; convert it first")


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


@torch.library.register_fake("liar_ext::gram_update_")
def _(gram, total, count, x, y=None, weight=None):
    same_device("gram_update_", "x", **locals())
    d = total.shape[0]
    torch._check(x.dim() == 2, lambda: f"gram_update_: x must be (tokens, {d}), got {x.shape}")


@torch.library.register_fake("liar_ext::reconstruct")
def _(weight, gram, kept, damps, holdout=None, cross=None, holdout_cross=None, errors_only=False):
    same_device("reconstruct", "weight", **locals())
    return reference.empty_results(weight, kept, damps, holdout, errors_only)


@torch.library.register_fake("liar_ext::obs_curve")
def _(weight, gram, width, damp, at_least, groups=1):
    same_device("obs_curve", "weight", **locals())
    removed = weight.shape[1] // width - at_least
    return (
        weight.new_empty(removed, dtype=torch.int64),
        weight.new_empty(removed + 1, dtype=torch.float64),
        weight.new_empty(2, dtype=torch.float64),
    )


PLAIN = {  # of each operator: its rules, and plain torch
    "gram_update_": (check_gram_update, reference.gram_update_),
    "obs_curve": (check_obs_curve, reference.obs_curve),
    "reconstruct": (check_reconstruct, reference.reconstruct),
}


@functools.cache
def _warn(device: str) -> None:
    """Say once that plain torch does the work on a device, and what to do."""
    if MISSING:
        why = f"the compiled extension is not in use ({MISSING})"
        todo = "run `pip install --no-build-isolation .` in the checkout, with a C++ compiler"
    else:
        why = f"the extension has no kernels for {device}"
        todo = "build with LIAR_CUDA=1 where nvcc is" if device == "CUDA" else "use --device cpu"
    warnings.warn(
        f"liar_ext: {why}; plain torch does its work, slower. To change that, {todo}. "
        "See docs/install.md",
        RuntimeWarning,
        stacklevel=5,
    )


def by_reference(name: str, device: str):
    """Return what an operator does on a device without kernels: checks, then plain torch."""
    check, op = PLAIN[name]

    def refer(*arguments):
        _warn(device)
        check(*arguments)
        with torch.no_grad():
            return op(*arguments)

    return refer


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Tell whether a CUDA device can run kernels of Ampere and later: cp.async, bfloat16 mma."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def serves(device: torch.device) -> bool:
    """Tell whether the CUDA kernels of the extension run on a device."""
    return "CUDA" in KERNELS and runs_kernels(device)


KERNELS = {  # dispatch keys that the extension which is loaded has kernels for
    device
    for device in ("CPU", "CUDA")
    if torch._C._dispatch_has_kernel_for_dispatch_key("liar_ext::gram_update_", device)
}
for _device in ("CPU", "CUDA", "XPU", "MPS", "PrivateUse1"):
    # On CUDA the others are half library, half kernel: liar_ext.ops.backends registers them.
    for _name in ("gram_update_",) if _device == "CUDA" else PLAIN:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"liar_ext::{_name}", _device):
            library.impl(_name, by_reference(_name, _device), _device)
