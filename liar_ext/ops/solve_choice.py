"""Which backend solves and eliminates on a GPU, by size; see :mod:`liar_ext.ops.choice`.

========================================  ==================================================
``reconstruct``, up to 128 kept features  ``csrc``, one launch for all λ, or ``torch``: chosen
``reconstruct``, more                     ``torch``: cuSOLVER and cuBLAS, by torch.linalg
``obs_curve``, units of one feature       ``csrc``, one launch a step, or ``torch``: chosen
``obs_curve``, wider units                ``torch``
========================================  ==================================================

``csrc`` are the CUDA kernels of this package. Where they are not, ``torch`` does everything.
``LIAR_SOLVE`` forces a backend where there is a choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.ops import checks, curve, dispatch, reference
from liar_ext.ops.choice import Backend, Chooser, Operator, power_of_two

SMALL = 128  # kept features of a system that one CUDA block solves
MOST = 4096  # columns, and features, of a problem that is timed
STEPS = 16  # removals of the elimination that is timed
TOLERANCE = 1e-8  # of the largest value, as in the tests of the kernels


@dataclass(frozen=True)
class Kind:
    """What a choice holds for; sizes are rounded up to powers of two, but for the number of λ."""

    device: torch.device
    sizes: tuple[int, ...] = ()

    def checked(self) -> Kind:
        """Return the kind of all sizes: one check serves them."""
        return Kind(self.device)

    def __str__(self) -> str:
        return " ".join([str(self.device), " × ".join(map(str, self.sizes))]).rstrip()


def reconstruct_on_cuda(weight, gram, kept, *more):
    """Solve by cuSOLVER, and small systems by the faster of it and a kernel, without waiting."""
    checks.check_reconstruct(weight, gram, kept, *more, values=False)
    small = kept.shape[-1] <= SMALL and dispatch.serves(weight.device)
    with torch.no_grad():
        solve = _solve if small else None
        return reference.reconstruct(weight, gram, kept, *more, solve=solve)


def _solve(block: Tensor, side: Tensor, shifts: Tensor):
    sizes = power_of_two(len(block), SMALL), power_of_two(side.shape[1], MOST), len(shifts)
    return solves.backend(Kind(block.device, sizes))(block, side, shifts)


def _solve_by_kernel(block, side, shifts):
    contiguous = block.contiguous(), side.contiguous(), shifts
    x, code, diagonal = torch.ops.liar_ext._solve_small(*contiguous)
    return zip(x, code, reference.condition_of(diagonal), strict=True)


def obs_curve_on_cuda(weight, gram, width, *more):
    """Eliminate single features by the faster of a kernel and libraries, wider units by these."""
    checks.check_obs_curve(weight, gram, width, *more)
    eliminate = None
    if width == 1 and dispatch.serves(weight.device):
        eliminate = curves.backend(Kind(weight.device, (power_of_two(len(gram), MOST),)))
    with torch.no_grad():
        return curve.obs_curve(weight, gram, width, *more, eliminate=eliminate)


def _eliminate_by_kernel(s: curve.Elimination, first: int, count: int):
    rows = s.h.new_empty(2, count, len(s.unit))
    gone = torch.zeros_like(s.unit, dtype=torch.bool)
    diagonals = (each.diagonal().clone() for each in (s.h, s.v))
    state = s.h, s.v, s.unit, s.lost, s.order, s.error
    torch.ops.liar_ext._eliminate_(*state, *rows, gone, *diagonals, first, s.per_group)
    return *rows, gone


def existing(kernel: Backend, library: Backend, device: torch.device) -> Mapping[str, Backend]:
    """Return the backends that exist on a device."""
    return ({"csrc": kernel} if dispatch.serves(device) else {}) | {"torch": library}


def solve_fault(solve: Backend, kind: Kind) -> str:
    """Return what is wrong with solves of a sound and of an indefinite system, or nothing."""
    weight, gram = _layer(40, 200)
    damps = torch.tensor([0, 1e-3, 10, torch.inf], dtype=torch.float64)
    indefinite = gram.clone()
    indefinite[7, 7] = -1
    for sums, n in ((gram, 97), (indefinite, SMALL)):
        arguments = weight, sums, torch.arange(n), damps, gram
        there = (each.to(kind.device) for each in arguments)
        got = reference.reconstruct(*there, solve=solve)
        if why := _difference("W' error held-out info", got, reference.reconstruct(*arguments)):
            return f"{n} kept features: {why}"
    return ""


def curve_fault(eliminate: Backend, kind: Kind) -> str:
    """Return what is wrong with a curve of single features in groups, or nothing."""
    weight, gram = _layer(40, 161)
    more = 1, 1e-2, 7, 7
    got = curve.obs_curve(*(each.to(kind.device) for each in (weight, gram)), *more, eliminate)
    return _difference("order error info", got, curve.obs_curve(weight, gram, *more))


def _layer(d_out: int, d: int) -> tuple[Tensor, Tensor]:
    """Return a weight and a Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(d_out + 2 * d, d, generator=generator, dtype=torch.float64)
    return both[:d_out], both[d_out:].mT @ both[d_out:] / (2 * d)


def _difference(names: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str:
    """Return the first element of a result that is wrong, or nothing."""
    for name, found, right in zip(names.split(), got, want, strict=True):
        a, b = found.double().cpu(), right.double()
        room = TOLERANCE * b.nan_to_num(0, 0, 0).abs().max()
        wrong = ~torch.isclose(a, b, rtol=0, atol=float(room), equal_nan=True)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{name}{list(at)} is {a[at]:.9g} where {b[at]:.9g} is right"
    return ""


def solve_problem(kind: Kind) -> Callable[[Backend], object]:
    """Return what solves systems of this kind by a backend."""
    n, columns, ladder = kind.sizes
    like = {"dtype": torch.float64, "device": kind.device}
    system = (
        torch.eye(n, **like) + 1 / n,
        torch.ones(n, columns, **like),
        torch.ones(ladder, **like),
    )
    return lambda solve: list(solve(*system))  # one by one, of a library


def curve_problem(kind: Kind) -> Callable[[Backend], object]:
    """Return what removes some features of this many by a backend."""
    (n,) = kind.sizes
    like = {"dtype": torch.float64, "device": kind.device}
    eye, unit = torch.eye(n, **like), torch.arange(n, device=kind.device)

    def run(eliminate: Backend) -> object:
        made = torch.full_like(unit[:1], -1), unit.clone(), torch.zeros(n + 1, **like)
        return eliminate(curve.Elimination(eye, eye, unit, *made, 1, n), 0, STEPS)

    return run


solves = Chooser(
    Operator(
        "reconstruct",
        "LIAR_SOLVE",
        functools.partial(existing, _solve_by_kernel, reference.solve_by_library),
        solve_fault,
        solve_problem,
    )
)
curves = Chooser(
    Operator(
        "obs_curve",
        "LIAR_SOLVE",
        functools.partial(existing, _eliminate_by_kernel, curve.eliminate_panel),
        curve_fault,
        curve_problem,
    )
)
dispatch.library.impl("reconstruct", reconstruct_on_cuda, "CUDA")
dispatch.library.impl("obs_curve", obs_curve_on_cuda, "CUDA")
