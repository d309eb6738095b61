"""Solve a consumer towards a target, with λ and the share of the target chosen on held-out tokens.

The own target of a consumer is its dense output ``W x̂ + b`` on the input x̂ that it is given. A
target ``y*`` may ask for more; with ``r = y* − (W x̂ + b)`` the shortfall, a *share* α of it is
asked for::

    α = 0   own target: restore what the removed features P did, W_P x̂_P
    α = 1   the target: restore W_P x̂_P + r

Both the solution and the sums are linear in α, so one solve serves every α.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.moments import Moments, centre, check_finite, check_folds, symmetric
from liar_ext.data.batches import FOLDS
from liar_ext.reconstruction.result import Solution, check_solved, least_held_out, ratio
from liar_ext.reconstruction.settings import damp_ladder


@dataclass
class Shortfall:
    """Sums over tokens of the shortfall ``r = y* − (W x̂ + b)`` of a target, in two folds.

    Parameters
    ----------
    cross : Tensor
        ``Σ_t w_t x̂_t r_tᵀ`` per fold, ``(2, d_in, d_out)`` float64.
    total : Tensor
        ``Σ_t w_t r_t`` per fold, ``(2, d_out)`` float64.
    energy : Tensor
        ``Σ_t w_t |r_t|²`` per fold, ``(2,)`` float64.
    """

    cross: Tensor
    total: Tensor
    energy: Tensor

    @classmethod
    def zeros(cls, d_in: int, d_out: int, *, device: str | torch.device = "cpu") -> Shortfall:
        """Return the sums over no tokens; they are those of the own target, too."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(FOLDS, *shape, dtype=torch.float64, device=device)

        return cls(zeros(d_in, d_out), zeros(d_out), zeros())

    def update(self, x: Tensor, r: Tensor, fold: int, weight: Tensor) -> None:
        """Add tokens to a fold.

        Parameters
        ----------
        x, r : Tensor
            ``(tokens, d_in)`` and ``(tokens, d_out)``, of one dtype; rows in use must be finite.
        fold : int
            Which sums to add to.
        weight : Tensor
            ``(tokens,)``: which rows are in use, or what each counts.
        """
        unused, count = torch.zeros_like(self.cross[fold, :, 0]), self.energy.new_zeros(2)
        ops.gram_update_(self.cross[fold], unused, count, x, r, weight)
        used = weight.bool()
        wide, scale = r.detach()[used].double(), weight[used].double()[:, None]
        self.total[fold] += (scale * wide).sum(0)
        self.energy[fold] += (scale * wide.square()).sum()


def solve_towards(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    shortfall: Shortfall,
    kept: Tensor,
    *,
    mode: str = "linear",
    damp: float | str = "auto",
    shares: tuple[float, float] = (0.0, 1.0),
) -> Solution:
    """Reconstruct one consumer towards a target, as far as held-out tokens support it.

    ``W'ᵀ = (Ĝ_KK + Λ)⁻¹ (Ĉ_K + Λ W_Kᵀ)`` with ``Ĉ = Ĝ Wᵀ + α Σ x̂ rᵀ``, which is
    ``W'_K = W_K + W_P Ĝ_PK (Ĝ_KK + Λ)⁻¹ + α (Σ r x̂_Kᵀ) (Ĝ_KK + Λ)⁻¹``. In the affine form all
    sums are centred, and ``b' = b + W μ + α ρ − W' μ_K`` with μ, ρ the means of x̂ and r.

    The pair (λ, α) is the one with the least held-out error ``Σ_B |W' x̂_K + b' − y*|²``: solved on
    fold A and judged on fold B, and the other way round. For each λ that is a parabola in α, whose
    minimum over ``shares`` is taken exactly. Where ``shares`` begins at 0 the own target competes
    by the same yardstick, so that the choice is never worse on held-out tokens than it. What does
    worse than plain dropping in one of the folds is left out, as in
    :func:`liar_ext.reconstruction.ridge.solve`.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(d_out, d_in)``.
    bias : Tensor or None
        ``b``, ``(d_out,)``.
    moments : Moments
        Of the input x̂ that the consumer has in the pruned model.
    shortfall : Shortfall
        Of the target, over the same tokens.
    kept : Tensor
        ``(n_kept,)`` int64, ascending: features that stay.
    mode : {"linear", "affine"}
        Whether the bias takes part.
    damp : float or "auto"
        λ, or the choice among ``DAMP_LADDER``.
    shares : (float, float)
        Least and greatest α.

    Returns
    -------
    Solution
        Its errors are those to the full target ``y*``, whatever the share, relative to
        ``tr(W Ĝ Wᵀ)``.

    Raises
    ------
    InputError
        If a fold has no tokens, or a given damp leaves ``Ĝ_KK + Λ`` singular.

    Notes
    -----
    Source: docs/method.md, section "Layerwise reconstruction".
    """
    check_folds(moments)
    check_finite(shortfall.cross, shortfall.total, shortfall.energy)
    affine = mode == "affine"
    device = moments.gram.device
    wide, kept = weight.detach().to(device, torch.float64), kept.to(device)
    ladder = damp_ladder(damp)
    damps = torch.tensor(ladder, dtype=torch.float64, device=device)
    folds = [_Sums.of_fold(moments, shortfall, fold) for fold in range(FOLDS)]
    parabolas = [
        _held_out(wide, folds[fold], folds[FOLDS - 1 - fold], kept, damps, affine)
        for fold in range(FOLDS)
    ]
    best, share, held_out = _least(torch.stack(parabolas), ladder, *shares)

    sums = folds[0] + folds[1]
    mean, offset = sums.means(affine)
    gram = symmetric(centre(sums.gram, sums.total, sums.tokens, mean))
    own = gram @ wide.mT
    # Centred cross-sums of the shortfall; the error to judge by is that to all of it.
    asked = sums.cross - torch.outer(sums.total, offset)
    new, _, error, info = ops.reconstruct(
        wide,
        gram,
        kept,
        damps[best : best + 1],
        holdout=gram,
        cross=own + share * asked,
        holdout_cross=own + asked,
    )
    check_solved(info[0, 0], held_out, ladder[best], damp)
    left = sums.tokens * offset.square().sum()  # of the energy, held by the mean
    error = error[0] + (wide.mT * (own + 2 * asked)).sum() + sums.energy - left
    error += (1 - share) ** 2 * left
    new_bias = None
    if affine:
        start = wide.new_zeros(len(wide)) if bias is None else bias.detach().to(wide)
        new_bias = start + wide @ mean - new[0] @ mean[kept] + share * offset
    whole = symmetric(sums.gram) @ wide.mT if affine else own
    energy = (wide.mT * whole).sum()
    solved = ladder[best] < math.inf
    return Solution(
        weight=new[0],
        bias=new_bias,
        damp=ladder[best],
        error=ratio(error, energy),
        holdout_error=ratio(held_out, energy),
        condition=float(info[0, 1]),
        path=f"{mode}, cholesky float64" if solved else f"{mode}, drop",
        share=share,
    )


@dataclass(frozen=True)
class _Sums:
    """All sums over the tokens of one fold, or of both."""

    gram: Tensor  # Σ x̂ x̂ᵀ, lower triangle
    total: Tensor  # Σ x̂
    tokens: Tensor
    cross: Tensor  # Σ x̂ rᵀ
    missing: Tensor  # Σ r
    energy: Tensor  # Σ |r|²

    @classmethod
    def of_fold(cls, moments: Moments, shortfall: Shortfall, fold: int) -> _Sums:
        return cls(
            moments.gram[fold],
            moments.total[fold],
            moments.tokens[fold],
            shortfall.cross[fold],
            shortfall.total[fold],
            shortfall.energy[fold],
        )

    def __add__(self, other: _Sums) -> _Sums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Sums(*(mine + theirs for mine, theirs in pairs))

    def means(self, affine: bool) -> tuple[Tensor, Tensor]:
        """Return the means of x̂ and r; the plain form centres about 0."""
        scale = 1 / self.tokens if affine else 0.0
        return self.total * scale, self.missing * scale


@dataclass(frozen=True)
class _Normal:
    """The normal equations of what the features that stay have to restore.

    ``x̃ = x̂ − mean``; a last row, and column, stands for a constant feature 1.
    """

    block: Tensor  # Σ x̃_K x̃_Kᵀ, (n + 1, n + 1)
    removed: Tensor  # Σ x̃_K (W_P x̃_P)ᵀ, (n + 1, d_out)
    shortfall: Tensor  # Σ x̃_K rᵀ, (n + 1, d_out)
    energy: Tensor  # Σ |W_P x̃_P + r|²

    @classmethod
    def about(cls, mean: Tensor, weight: Tensor, sums: _Sums, kept: Tensor) -> _Normal:
        d = len(mean)
        gram = sums.gram.new_empty(d + 1, d + 1)
        gram[:d, :d] = symmetric(centre(sums.gram, sums.total, sums.tokens, mean))
        gram[d, :d] = gram[:d, d] = sums.total - sums.tokens * mean
        gram[d, d] = sums.tokens
        cross = torch.cat([sums.cross - torch.outer(mean, sums.missing), sums.missing[None]])
        gone = torch.ones(d + 1, dtype=torch.bool, device=gram.device)
        gone[kept] = gone[d] = False
        stays = torch.cat([kept, kept.new_tensor([d])])
        leaving = weight[:, gone[:d]].mT
        removed = gram[:, gone] @ leaving
        energy = (leaving * (removed + 2 * cross)[gone]).sum() + sums.energy
        return cls(gram[stays][:, stays], removed[stays], cross[stays], energy)


def _held_out(
    weight: Tensor, fit: _Sums, judge: _Sums, kept: Tensor, damps: Tensor, affine: bool
) -> Tensor:
    """Return per λ the parabola ``e₀ + e₁ α + e₂ α²`` of the held-out error, ``(L, 3)``.

    With ``Ĝ_KK = Q diag(s) Qᵀ`` on the fold of the fit, the change of weights is
    ``Zᵀ = Q diag(f) Qᵀ (R₀ + α R₁)``, ``f = 1 / (s + Λ)``. In the basis Q the held-out error
    ``e − 2⟨Z, R⟩ + tr(Z G Zᵀ)`` is ``e − 2 f·u + fᵀ H f``, with u and H the same for every λ: the
    ladder costs one eigendecomposition.
    """
    mean, offset = fit.means(affine)
    ours, theirs = (_Normal.about(mean, weight, sums, kept) for sums in (fit, judge))
    n = len(kept)
    values, vectors = torch.linalg.eigh(ours.block[:n, :n])
    scale = values.mean() if n else values.new_ones(())
    scale = torch.where(scale == 0, 1.0, scale)
    filters = 1 / (values + damps[:, None] * scale)
    # A singular matrix solves nothing: NaN here, and an error if no other λ is left.
    filters = torch.where((values + damps[:, None] * scale) > 0, filters, math.nan)
    # The constant feature carries the change of the bias, whatever λ.
    filters = torch.cat([filters, torch.ones_like(damps)[:, None]], dim=1)

    def rotate(rows: Tensor) -> Tensor:
        return torch.cat([vectors.mT @ rows[:n], rows[n:]])

    removed = torch.cat([vectors.mT @ ours.removed[:n], torch.zeros_like(offset)[None]])
    shortfall = torch.cat([vectors.mT @ ours.shortfall[:n], offset[None]])
    block = rotate(rotate(theirs.block).mT)
    wanted = rotate(theirs.removed + theirs.shortfall)

    def linear(a: Tensor) -> Tensor:
        return filters @ (a * wanted).sum(1)

    def quadratic(a: Tensor, b: Tensor) -> Tensor:
        return ((filters @ ((a @ b.mT) * block)) * filters).sum(1)

    constant = theirs.energy - 2 * linear(removed) + quadratic(removed, removed)
    slope = 2 * quadratic(removed, shortfall) - 2 * linear(shortfall)
    return torch.stack([constant, slope, quadratic(shortfall, shortfall)], dim=1)


def _least(
    parabolas: Tensor, ladder: Sequence[float], low: float, high: float
) -> tuple[int, float, Tensor]:
    """Return the λ, by index, and the share of least error, and that error.

    ``parabolas`` are by fold and λ, ``(2, L, 3)``.
    """
    _, slope, curve = parabolas.sum(0).unbind(1)
    share = torch.where(curve > 0, -slope / (2 * curve), low).clamp(low, high)
    # The least share competes at every λ, whatever the folds say of a greater one.
    share = torch.cat([torch.full_like(share, low), share])
    constant, slope, curve = parabolas.repeat(1, 2, 1).unbind(2)
    errors = constant + share * slope + share.square() * curve
    best = least_held_out(errors, [*ladder, *ladder])
    return best % len(ladder), float(share[best]), errors[:, best].sum()
