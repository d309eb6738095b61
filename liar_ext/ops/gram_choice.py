"""Which backend updates a Gram matrix on a GPU, see :mod:`liar_ext.ops.choice`.

Three do the same: ``csrc`` is the CUDA kernel of this package, ``triton`` one Triton kernel,
``torch`` triangle panels through cuBLAS. ``LIAR_GRAM`` forces one.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liar_ext.ops import checks, dispatch, reference
from liar_ext.ops.choice import Chooser, Operator, power_of_two

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2.0**-20}  # of the sum of magnitudes
HALF_TOLERANCE = 2.0**-17
MOST = 4096  # features, and tokens, of the problem that is timed
Update = Callable[..., None]


@dataclass(frozen=True)
class Kind:
    """What a choice holds for; sizes are rounded up to powers of two."""

    device: torch.device
    dtype: torch.dtype
    sums: torch.dtype
    weighted: bool
    cross: bool
    tokens: int = 0
    features: int = 0

    @classmethod
    def of(cls, gram: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None) -> Kind:
        """Return the kind of a call."""
        weighted = weight is not None and weight.dtype != torch.bool
        sizes = (power_of_two(n, MOST) for n in x.shape)
        return cls(x.device, x.dtype, gram.dtype, weighted, y is not None, *sizes)

    def checked(self) -> Kind:
        """Return the kind of all sizes: one check serves them."""
        return replace(self, tokens=0, features=0)

    def __str__(self) -> str:
        words = [str(one).removeprefix("torch.") for one in (self.device, self.dtype, self.sums)]
        words += ["weighted"] * self.weighted + ["cross"] * self.cross
        words += [f"{self.tokens} × {self.features}"] if self.tokens else []
        return " ".join(words)


def gram_update_(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Update by the backend that was chosen for calls of this kind."""
    arguments = gram, total, count, x, y, weight
    name = chooser.choose(Kind.of(gram, x, y, weight))
    if name != "csrc":
        checks.check_gram_update(*arguments)  # as its launcher does
    with torch.no_grad():
        chooser.backends(x.device)[name](*arguments)


def existing(device: torch.device) -> dict[str, Update]:
    """Return the backends that exist on a device."""
    found: dict[str, Update] = {}
    modern = device.type == "cuda" and dispatch.runs_kernels(device)
    if modern and dispatch.serves(device):
        found["csrc"] = torch.ops.liar_ext.gram_update_
    if modern and importlib.util.find_spec("triton"):
        with contextlib.suppress(ImportError):
            from liar_ext.ops import gram_triton

            found["triton"] = gram_triton.gram_update_
    return {**found, "torch": reference.gram_update_}


def fault(update: Update, kind: Kind) -> str:
    """Return what is wrong with a backend on a small problem, or nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens, d, columns = 700, 161, 133 if kind.cross else 161
    x = (torch.randn(tokens, d, generator=generator) + 0.5).to(kind.dtype)
    y = None
    if kind.cross:
        y = torch.randn(tokens, columns, generator=generator).to(kind.dtype)
    weight = torch.rand(tokens, generator=generator)
    weight = weight if kind.weighted else weight > 0.1
    weight[0], weight[1:4] = 0, 1
    x[0], x[2, 40], x[699, 160] = torch.nan, torch.inf, torch.nan  # skipped, dropped, dropped
    weight[699] = 1
    got, want, bound = (_sums(x, y, dtype) for dtype in (kind.sums, None, None))
    wide, right = x.double(), None if y is None else y.double()
    reference.gram_update_(*want, wide, right, weight)
    reference.gram_update_(*bound, wide.abs(), None if right is None else right.abs(), weight)
    got = [(one + 1).to(kind.device) for one in got]
    move = (None if one is None else one.to(kind.device) for one in (x, y, weight))
    with torch.no_grad():
        update(*got, *move)
    found = [one.double().cpu() - 1 for one in got]
    rounding = torch.finfo(kind.sums).eps
    allowed = TOLERANCE.get(kind.dtype, HALF_TOLERANCE)
    for name, a, b, scale in zip(("gram", "total", "count"), found, want, bound, strict=True):
        wrong = ~((a - b).abs() <= allowed * scale + 4 * rounding * (1 + b.abs()))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{name}{list(at)} is {a[at]:.9g} where {b[at]:.9g} is right"
    return ""


def _sums(x: Tensor, y: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return empty sums over rows, on their device."""
    columns, wide = x.shape[1] if y is None else y.shape[1], torch.float64
    shapes = ((x.shape[1], columns), dtype), ((x.shape[1],), dtype), ((2,), wide)
    return [torch.zeros(shape, dtype=kind or wide, device=x.device) for shape, kind in shapes]


def problem(kind: Kind) -> Callable[[Update], object]:
    """Return what updates sums of this kind by a backend."""
    x = torch.ones(kind.tokens, kind.features, dtype=kind.dtype, device=kind.device)
    weight = torch.rand(kind.tokens, device=kind.device) if kind.weighted else None
    y = x if kind.cross else None
    arguments = *_sums(x, y, kind.sums), x, y, weight
    return lambda update: update(*arguments)


OPERATOR = Operator("gram_update_", "LIAR_GRAM", existing, fault, problem)
chooser = Chooser(OPERATOR)
