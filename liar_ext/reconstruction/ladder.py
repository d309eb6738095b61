"""The walk down a ladder of λ: held-out errors of one λ at a time, until they rise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.reconstruction.result import least_held_out

ROW_BLOCK = 256
# From a start and a stop to these rows of a symmetric matrix, up to the column of the stop.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Fit:
    """A solve on one fold with any λ, judged on the other fold.

    The change of the weights is ``Zᵀ = (G_KK + Λ)⁻¹ (R₀ + α R₁)``, of a share α of the target. A
    last row, and column, of what judges it stands for a constant feature 1, which carries the
    change of the bias.

    Parameters
    ----------
    block : Tensor
        ``G_KK`` of the fit, ``(n, n)`` float64.
    right : Tensor
        ``[R₀, R₁]``, ``(n, 2 d_out)``.
    offset : Tensor
        The change of the bias by all of the target, ``(d_out,)``.
    judge : Tensor
        ``G_KK`` that judges, ``(n + 1, n + 1)``.
    wanted : Tensor
        ``Σ x_K yᵀ`` of what is to be restored where it is judged, ``(n + 1, d_out)``.
    energy : Tensor
        ``Σ |y|²``.
    """

    block: Tensor
    right: Tensor
    offset: Tensor
    judge: Tensor
    wanted: Tensor
    energy: Tensor

    def parabola(self, damp: float) -> Tensor:
        """Return the held-out error ``e₀ + e₁ α + e₂ α²``, ``(3,)``; NaN where it has no solution.

        One Cholesky factor, and :func:`error_of_shares`.
        """
        factor = None
        if len(self.block) and not math.isinf(damp):
            factor = self.block.clone()
            if not factor_with_damp(factor, damp):
                return self.right.new_full((3,), math.nan)
        change = change_by(factor, self.right, self.offset)
        return error_of_shares(change, rows_of(self.judge), self.wanted, self.energy)


def slices(count: int, size: int = ROW_BLOCK) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``count``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def rows_of(square: Tensor) -> Rows:
    """Return the block rows of a matrix that is there as a whole."""
    return lambda start, stop: square[start:stop, :stop]


def factor_with_damp(square: Tensor, damp: float) -> bool:
    """Put L with ``square + Λ = L Lᵀ`` in the lower triangle, as :func:`factor_in_place` does."""
    scale = square.diagonal().mean()
    square.diagonal().add_(damp * torch.where(scale == 0, 1.0, scale))
    return factor_in_place(square)


def change_by(factor: Tensor | None, right: Tensor, offset: Tensor) -> Tensor:
    """Return ``Z``, ``(n + 1, columns)``, the last row that of the bias.

    Parameters
    ----------
    factor : Tensor or None
        L, ``(n, n)``; None where λ is infinite, or nothing stays: then only the last row comes.
    right : Tensor
        ``[R₀, R₁]``, or ``R₀`` alone.
    offset : Tensor
        Change of the bias, of the columns of R₁.
    """
    n, columns = 0 if factor is None else len(factor), right.shape[1]
    change = right.new_zeros(n + 1, columns)
    change[n, columns - len(offset) :] = offset
    if factor is not None:
        change[:n] = right
        substitute(factor, change[:n])
        substitute_back(factor, change[:n])
    return change


def error_of_shares(change: Tensor, judge: Rows, wanted: Tensor, energy: Tensor) -> Tensor:
    """Return ``e = Σ |y|² − 2 ⟨Z, Σ x_K yᵀ⟩ + tr(Zᵀ G Z)`` as ``e₀ + e₁ α + e₂ α²``, ``(3,)``.

    Parameters
    ----------
    change : Tensor
        What :func:`change_by` gives: of ``[R₀, R₁]``, or of R₀ alone, of which no share is taken.
    judge : callable
        Block rows of ``G``, ``(n + 1, n + 1)``.
    wanted : Tensor
        ``(n + 1, d_out)``.
    energy : Tensor
        ``Σ |y|²``.
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


def factor_in_place(square: Tensor) -> bool:
    """Put L with ``square = L Lᵀ`` in its lower triangle; False where that isn't positive definite.

    By block columns, what is to the left of one taken from it at once: nearly all of it products.
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


def substitute(factor: Tensor, right: Tensor) -> None:
    """Put ``L⁻¹ R`` in the place of R, ``(n, columns)``; nearly all of it products, by halves."""
    n = len(factor)
    if n <= ROW_BLOCK:
        right.copy_(torch.linalg.solve_triangular(factor, right, upper=False))
        return
    top, below = right[: n // 2], right[n // 2 :]
    substitute(factor[: n // 2, : n // 2], top)
    torch.addmm(below, factor[n // 2 :, : n // 2], top, alpha=-1, out=below)
    substitute(factor[n // 2 :, n // 2 :], below)


def substitute_back(factor: Tensor, right: Tensor) -> None:
    """Put ``L⁻ᵀ R`` in the place of R, ``(n, columns)``."""
    n = len(factor)
    if n <= ROW_BLOCK:
        right.copy_(torch.linalg.solve_triangular(factor.mT, right, upper=True))
        return
    top, below = right[: n // 2], right[n // 2 :]
    substitute_back(factor[n // 2 :, n // 2 :], below)
    torch.addmm(top, factor[n // 2 :, : n // 2].mT, below, alpha=-1, out=top)
    substitute_back(factor[: n // 2, : n // 2], top)


def half_product(square: Rows, right: Tensor, first: int = 0) -> Tensor:
    """Return ``V = (S + D / 2) R`` with ``square = S + Sᵀ + D``, D its blocks on the diagonal.

    So ``Rᵀ square R = Rᵀ V + Vᵀ R`` for half of the operations. With ``first`` the rows and columns
    from there on count.
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
    """The λ and the share of least held-out error, that error, and how many λ were tried."""

    damp: float
    share: float
    held_out: Tensor
    tried: int

    def said_of(self, ladder: Sequence[float]) -> str:
        """Return what the path of a solve says of the walk."""
        return f", {self.tried} of {len(ladder)} λ" if len(ladder) > 1 else ""


def choose(
    parabolas: Callable[[float], Tensor], ladder: Sequence[float], low: float, high: float
) -> Choice:
    """Return the λ and the share α in ``[low, high]`` of least held-out error.

    From the top of the ladder down, until the error of both folds at its best α rises. So the
    choice is that of the whole ladder wherever the error falls and then rises along it.

    Parameters
    ----------
    parabolas : callable
        From λ to the parabolas of both folds, ``(2, 3)``.
    ladder : sequence of float
        Ascending λ.
    low, high : float
        Least and greatest share.
    """
    found: list[Tensor] = []
    least = math.inf
    for damp in reversed(ladder):
        found.insert(0, parabolas(damp))
        error, _ = held_out_errors(found[0][:, None], low, high)
        now = float(error.sum(0).nan_to_num(nan=math.inf, posinf=math.inf).min())
        if now > least:
            break
        least = now
    errors, share = held_out_errors(torch.stack(found, 1), low, high)
    tried = ladder[-len(found) :]
    best = least_held_out(errors, [*tried, *tried])
    return Choice(tried[best % len(tried)], float(share[best]), errors[:, best].sum(), len(tried))


def held_out_errors(parabolas: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the held-out errors by fold, ``(2, 2 λ)``, and their shares, ``(2 λ,)``.

    ``parabolas`` are by fold and λ, ``(2, λ, 3)``. First come those of the least share, which
    competes at every λ, whatever the folds say of a greater one; then those of the best.
    """
    _, slope, curve = parabolas.sum(0).unbind(1)
    share = torch.where(curve > 0, -slope / (2 * curve), low).clamp(low, high)
    share = torch.cat([torch.full_like(share, low), share])
    constant, slope, curve = parabolas.repeat(1, 2, 1).unbind(2)
    return constant + share * slope + share.square() * curve, share
