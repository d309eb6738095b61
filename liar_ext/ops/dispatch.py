"""What the operators do where they have no kernel: shapes alone, a refusal, or plain torch.

Importing this module loads the extension, which registers the operators and their kernels.
"""

from __future__ import annotations

import os

import torch

from liar_ext.errors import InputError
from liar_ext.ops import reference

try:
    from liar_ext import _C  # noqa: F401  importing it registers the operators
except ImportError as error:
    raise ImportError(
        f"liar_ext: the compiled extension liar_ext._C cannot be imported ({error}); build it with "
        "`pip install --no-build-isolation -e .` in the source tree, with torch >= 2.10 installed"
    ) from error

OPERATORS = ("gram_update_", "obs_curve", "reconstruct")


def _check_device(op: str, first: str, **tensors) -> None:
    """Refuse tensors of several devices, of which torch picks the kernel of one."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        torch._check(
            tensor is None or tensor.device == device,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must be on the device of {first}, {device}, got {tensor.device}; "
                "move it with .to(device)"
            ),
        )


@torch.library.register_fake("liar_ext::gram_update_")
def _(gram, total, count, x, y=None, weight=None):
    _check_device("gram_update_", "x", x=x, gram=gram, total=total, count=count, y=y, weight=weight)
    d = total.shape[0]
    torch._check(x.dim() == 2, lambda: f"gram_update_: x must be (tokens, {d}), got {x.shape}")


@torch.library.register_fake("liar_ext::reconstruct")
def _(weight, gram, kept, damps, holdout=None, cross=None, holdout_cross=None, errors_only=False):
    _check_device(
        "reconstruct",
        "weight",
        weight=weight,
        gram=gram,
        kept=kept,
        damps=damps,
        holdout=holdout,
        cross=cross,
        holdout_cross=holdout_cross,
    )
    ladder, sites = damps.shape[0], weight.shape[:-2]

    def empty(*shape):
        return weight.new_empty((*sites, *shape), dtype=torch.float64)

    held_out = empty(0 if holdout is None else ladder)
    new = empty(0 if errors_only else ladder, weight.shape[-2], kept.shape[-1])
    return new, empty(ladder), held_out, empty(ladder, 2)


@torch.library.register_fake("liar_ext::obs_curve")
def _(weight, gram, width, damp, at_least, groups=1):
    _check_device("obs_curve", "weight", weight=weight, gram=gram)
    removed = weight.shape[1] // width - at_least
    return (
        weight.new_empty(removed, dtype=torch.int64),
        weight.new_empty(removed + 1, dtype=torch.float64),
        weight.new_empty(2, dtype=torch.float64),
    )


def _refuse(op, device: str):
    """Return what ``op`` does on a device without kernels: raise, or plain torch where asked."""
    device = "ROCm" if device == "CUDA" and torch.version.hip else device
    build = ""
    if device == "CUDA":
        build = "build with `LIAR_CUDA=1 pip install --no-build-isolation -e .` where nvcc is, "

    def refuse_or_refer(*arguments):
        if os.environ.get("LIAR_REFERENCE") == "1":
            return op(*arguments)
        raise InputError(
            f"{op.__name__}: tensors must be on a device that this build has kernels for, got "
            f"{device}; {build}move them to the CPU, or set LIAR_REFERENCE=1 for plain torch, slow"
        )

    return refuse_or_refer


_without_kernels = torch.library.Library("liar_ext", "IMPL")
for _name in OPERATORS:
    for _device in ("CUDA", "XPU", "MPS"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"liar_ext::{_name}", _device):
            _without_kernels.impl(_name, _refuse(getattr(reference, _name), _device), _device)
