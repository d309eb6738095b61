"""Choose λ and the step size: held-out errors down a ladder of λ, by one Cholesky factor each.

All of it by blocks of rows, so that matrices may lie in files (:func:`in_file`).
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from liar_ext.system.errors import is_out_of_memory, one_line

ROW_BLOCK = 256
Done = TypeVar("Done")
# /tmp may itself be held in memory; this folder is for files that are large (hier(7)).
LARGE_FILES = "/var/tmp"
# From a start and a stop to these rows of a symmetric matrix, up to the column of the stop.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Equations:
    """The normal equations of what the kept features have to restore, y, over some tokens.

    Features are centred; a last one is constant 1, and carries the change of the bias.
    """

    rows: Rows  # of G_KK, (n + 1, n + 1)
    # For some outputs [R₀, R₁], (n + 1, 2 outputs): the cross-sums of x_K with what the removed
    # features gave, and with the residual of the target. Without one R₀; to judge R₀ + R₁.
    right: list[tuple[slice, Tensor]]
    energy: Tensor  # Σ |y|² of all outputs


@dataclass(frozen=True)
class Fit:
    """A solve ``Zᵀ = (G_KK + Λ)⁻¹ (R₀ + α R₁)`` with any λ, judged on the same or other tokens."""

    fitted: Equations
    judged: Equations  # about the same mean
    offset: Tensor  # the change of the bias by the whole step, (d_out,)
    square: Tensor  # room for the factor, (n, n) float64

    def parabola(self, damp: float) -> Tensor:
        """Return the error ``e₀ + e₁ α + e₂ α²``, ``(3,)``; NaN if there is no solution."""
        factor, solved = self.factor(damp)
        if not solved:
            return self.square.new_full((3,), math.nan)
        return sum(error for *_, error in self.changes(factor))

    def factor(self, damp: float) -> tuple[Tensor | None, bool]:
        """Return the factor, if this λ needs one, and whether there is a solution."""
        n = len(self.square)
        if not n or math.isinf(damp):
            return None, True
        for rows in slices(n):
            self.square[rows, : rows.stop] = self.fitted.rows(rows.start, rows.stop)
        return self.square, factor_with_damp(self.square, damp)

    def changes(self, factor: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield outputs, the change Z of their weights, and its error as a parabola of α.

        Its last row is that of the bias, and the only one without a factor.
        """
        n = 0 if factor is None else len(factor)
        for (here, mine), (_, theirs) in zip(self.fitted.right, self.judged.right, strict=True):
            count, columns = here.stop - here.start, mine.shape[1]
            change = mine.new_zeros(n + 1, columns)
            change[n, count:] = self.offset[here][: columns - count]
            if n:
                change[:n] = mine[:-1]
                substitute(factor, change[:n])
                substitute(factor, change[:n], back=True)
            first, *rest = theirs.split(count, 1)
            energy = 0.0 if here.start else self.judged.energy
            yield here, change, error_by_step(change, self.judged.rows, sum(rest, first), energy)


def slices(count: int, size: int = ROW_BLOCK) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``count``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def rows_of(square: Tensor) -> Rows:
    """Return the block rows of a matrix that is there as a whole."""
    return lambda start, stop: square[start:stop, :stop]


def error_by_step(change: Tensor, judge: Rows, wanted: Tensor, energy: Tensor | float) -> Tensor:
    """Return ``e = Σ |y|² − 2 ⟨Z, Σ x_K yᵀ⟩ + tr(Zᵀ G Z)`` as ``e₀ + e₁ α + e₂ α²``, ``(3,)``.

    ``judge`` has the block rows of G, ``wanted`` is ``Σ x_K yᵀ``, ``(n + 1, d_out)``.
    """
    live, h = len(wanted) - len(change), wanted.shape[1]
    half, wanted = half_product(judge, change, live), wanted[live:]
    pulled = (change.view(len(change), -1, h) * wanted[:, None]).sum((0, 2))
    a, b, half_a, half_b = change[:, :h], change[:, h:], half[:, :h], half[:, h:]
    constant = energy - 2 * pulled[0] + 2 * (a * half_a).sum()
    if not b.shape[1]:
        return torch.stack([constant, torch.zeros_like(constant), torch.zeros_like(constant)])
    mixed = (a * half_b).sum() + (half_a * b).sum()
    return torch.stack([constant, 2 * (mixed - pulled[1]), 2 * (b * half_b).sum()])


def factor_with_damp(square: Tensor, damp: float) -> bool:
    """Put L with ``square + Λ = L Lᵀ`` in the lower triangle, as :func:`factor_in_place` does."""
    scale = square.diagonal().mean()
    square.diagonal().add_(damp * torch.where(scale == 0, 1.0, scale))
    return factor_in_place(square)


def factor_in_place(square: Tensor) -> bool:
    """Put L with ``square = L Lᵀ`` in its lower triangle; False where that isn't positive definite.

    By block columns: nearly all of it products.
    """
    for rows in slices(len(square)):
        start, stop = rows.start, rows.stop
        column, left = square[start:, rows], square[start:, :start]
        if start:
            torch.addmm(column, left, left[: stop - start].mT, alpha=-1, out=column)
        corner, code = torch.linalg.cholesky_ex(column[: stop - start])
        if code != 0:
            return False
        column[: stop - start] = corner
        below = column[stop - start :]
        if len(below):
            below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
    return True


def substitute(factor: Tensor, right: Tensor, *, back: bool = False) -> None:
    """Put ``L⁻¹ R``, or ``L⁻ᵀ R``, in the place of R, ``(n, columns)``; by halves."""
    n, half = len(factor), len(factor) // 2
    if n <= ROW_BLOCK:
        lower = factor.mT if back else factor
        right.copy_(torch.linalg.solve_triangular(lower, right, upper=back))
        return
    between = factor[half:, :half]
    first, second = slice(half), slice(half, n)
    if back:
        first, second, between = second, first, between.mT
    substitute(factor[first, first], right[first], back=back)
    torch.addmm(right[second], between, right[first], alpha=-1, out=right[second])
    substitute(factor[second, second], right[second], back=back)


def half_product(square: Rows, right: Tensor, first: int = 0) -> Tensor:
    """Return ``V = (S + D / 2) R`` with ``square = S + Sᵀ + D``, D its blocks on the diagonal.

    So ``Rᵀ square R = Rᵀ V + Vᵀ R`` for half of the operations. Rows ``first`` and on count.
    """
    half = torch.empty_like(right)
    for rows in slices(len(right)):
        start = rows.start
        block = square(first + rows.start, first + rows.stop)[:, first:]
        torch.mm(block[:, start:], right[rows], out=half[rows])
        half[rows] *= 0.5
        if start:
            torch.addmm(half[rows], block[:, :start], right[:start], out=half[rows])
    return half


@dataclass(frozen=True)
class Choice:
    """The λ and the step size of least held-out error, that error, and how many λ were tried."""

    damp: float
    step_size: float
    held_out: Tensor
    tried: int


def choose(
    parabolas: Callable[[float], Tensor],
    ladder: Sequence[float],
    low: float,
    high: float,
    *,
    whole: bool = False,
) -> Choice:
    """Return the λ of an ascending ladder and the step size α of least held-out error.

    From the top of the ladder down, until the error at its best α rises; ``whole`` tries every λ.
    ``parabolas`` returns for a λ the errors of both folds as parabolas in α, ``(2, 3)``, whose
    minimum within ``[low, high]`` is taken exactly.
    """
    found: list[Tensor] = []
    least = math.inf
    for damp in reversed(ladder):
        found.insert(0, parabolas(damp))
        error, _ = held_out_errors(found[0][:, None], low, high)
        now = float(error.sum(0).nan_to_num(nan=math.inf, posinf=math.inf).min())
        if now > least and not whole:
            break
        least = now
    errors, step_size = held_out_errors(torch.stack(found, 1), low, high)
    tried = ladder[-len(found) :]
    best = least_held_out(errors, [*tried, *tried])
    held_out = errors[:, best].sum()
    return Choice(tried[best % len(tried)], float(step_size[best]), held_out, len(tried))


def held_out_errors(parabolas: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the held-out errors by fold, ``(2, 2 λ)``, and their step sizes, ``(2 λ,)``.

    First come those of the least step, which competes at every λ; then those of the best step.
    """
    _, slope, curve = parabolas.sum(0).unbind(1)
    step_size = torch.where(curve > 0, -slope / (2 * curve), low).clamp(low, high)
    step_size = torch.cat([torch.full_like(step_size, low), step_size])
    constant, slope, curve = parabolas.repeat(1, 2, 1).unbind(2)
    return constant + step_size * slope + step_size.square() * curve, step_size


def least_held_out(errors: Tensor, ladder: Sequence[float]) -> int:
    """Return the index of the λ of least held-out error, from those by fold, ``(2, λ)``.

    A λ that does worse than plain dropping, ∞ at the end of the ladder, in either fold is out: with
    few tokens a sum may be less by the luck of one.
    """
    total = errors.sum(0)
    if ladder[-1] == math.inf:
        total = total.masked_fill((errors > errors[:, -1:]).any(0), math.inf)
    return int(total.nan_to_num(nan=math.inf).argmin())


def in_file(*shape: int) -> Tensor:
    """Return a float64 zero tensor in an unlinked temporary file; MemoryError if there is no room.

    The disk space is allocated: without it a write to the map would end the process.
    """
    folder = os.environ.get("TMPDIR") or LARGE_FILES
    folder = folder if os.access(folder, os.W_OK) else tempfile.gettempdir()
    numbers = math.prod(shape)
    size = 8 * max(numbers, 1)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise MemoryError(
            f"not enough memory, and no file of {size / 2**20:.3g} MiB in {folder} to do without "
            f"({one_line(error)}); free some, or set TMPDIR to a folder on a disk with room"
        ) from error
    return torch.frombuffer(pages, dtype=torch.float64)[:numbers].view(shape)


def oom_fallback(
    device: torch.device,
    here: Callable[[], Done],
    in_file: Callable[[], Done],
    on_host: Callable[[], Done],
) -> Done:
    """Return ``here()``; if an allocation fails ``in_file()``, or on a GPU ``on_host()``."""
    try:
        return here()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: the traceback holds what was allocated.
    if device.type == "cpu":
        return in_file()
    torch.cuda.empty_cache()
    return on_host()
