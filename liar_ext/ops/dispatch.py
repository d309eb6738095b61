"""What the operators do where they have no kernel: shapes alone, or plain torch.

Importing this module loads the extension, which registers the operators and their kernels. Where it
cannot be loaded, or ``LIAR_REFERENCE=1`` is in the environment, the operators are registered here.
A device without kernels is served by plain torch, after one warning.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from liar_ext.errors import one_line
from liar_ext.ops import checks, curve, reference

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

PLAIN = {
    "gram_update_": reference.gram_update_,
    "obs_curve": curve.obs_curve,
    "reconstruct": reference.reconstruct,
}


@torch.library.register_fake("liar_ext::gram_update_")
def _(gram, total, count, x, y=None, weight=None):
    tensors = {"gram": gram, "total": total, "count": count, "x": x, "y": y, "weight": weight}
    checks.same_device("gram_update_", "x", **tensors)
    d = total.shape[0]
    torch._check(x.dim() == 2, lambda: f"gram_update_: x must be (tokens, {d}), got {x.shape}")


@torch.library.register_fake("liar_ext::reconstruct")
def _(weight, gram, kept, damps, holdout=None, cross=None, holdout_cross=None, errors_only=False):
    names = "weight", "gram", "kept", "damps", "holdout", "cross", "holdout_cross"
    tensors = weight, gram, kept, damps, holdout, cross, holdout_cross
    checks.same_device("reconstruct", "weight", **dict(zip(names, tensors, strict=True)))
    ladder, sites = damps.shape[0], weight.shape[:-2]

    def empty(*shape):
        return weight.new_empty((*sites, *shape), dtype=torch.float64)

    held_out = empty(0 if holdout is None else ladder)
    new = empty(0 if errors_only else ladder, weight.shape[-2], kept.shape[-1])
    return new, empty(ladder), held_out, empty(ladder, 2)


@torch.library.register_fake("liar_ext::obs_curve")
def _(weight, gram, width, damp, at_least, groups=1):
    checks.same_device("obs_curve", "weight", weight=weight, gram=gram)
    removed = weight.shape[1] // width - at_least
    return (
        weight.new_empty(removed, dtype=torch.int64),
        weight.new_empty(removed + 1, dtype=torch.float64),
        weight.new_empty(2, dtype=torch.float64),
    )


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
    op, check = PLAIN[name], getattr(checks, f"check_{name.rstrip('_')}")

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
    # On CUDA the others are half library, half kernel: liar_ext.ops.solve_choice registers them.
    for _name in ("gram_update_",) if _device == "CUDA" else PLAIN:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"liar_ext::{_name}", _device):
            library.impl(_name, by_reference(_name, _device), _device)
