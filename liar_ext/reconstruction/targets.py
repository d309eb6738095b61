"""Solve a consumer towards a target, with λ and the share of the target chosen on held-out tokens.

The own target of a consumer is its dense output ``W x̂ + b`` on the input x̂ that it is given. A
target ``y*`` may ask for more; with ``r = y* − (W x̂ + b)`` the shortfall, a *share* α of it is
asked for::

    α = 0   own target: restore what the removed features P did, W_P x̂_P
    α = 1   the target: restore W_P x̂_P + r

Both the solution and the sums are linear in α, so one solve serves every α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.moments import Moments, centre, check_finite, check_folds, symmetric
from liar_ext.data.batches import FOLDS
from liar_ext.reconstruction.ladder import Choice, Fit, choose
from liar_ext.reconstruction.result import Solution, check_solved, path_of, ratio
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
    weight, kept, ladder = weight.detach().to(device), kept.to(device), damp_ladder(damp)
    folds = [_Sums.of_fold(moments, shortfall, fold) for fold in range(FOLDS)]
    choice = _choose(weight, folds, kept, affine, ladder, shares)
    chosen, share = choice.damp, choice.share

    # In the order that has fewest matrices at a time: each may take a gigabyte.
    wide, sums = weight.double(), folds[0] + folds[1]
    mean, offset = sums.means(affine)
    energy = (wide.mT * (symmetric(sums.gram) @ wide.mT)).sum() if affine else None
    gram = sums.centred(mean)
    own = gram @ wide.mT
    energy = (wide.mT * own).sum() if energy is None else energy
    # Centred cross-sums of the shortfall; the error to judge by is that to all of it.
    asked = sums.cross.sub_(torch.outer(sums.total, offset))
    beyond = (wide.mT * (own + 2 * asked)).sum()
    of_target, left = sums.energy, sums.tokens * offset.square().sum()  # which the mean holds
    cross, asked = own.add_(share * asked), asked[kept]
    del sums
    damps = torch.tensor([chosen], dtype=torch.float64, device=device)
    new, error, _, info = ops.reconstruct(wide, gram, kept, damps, cross=cross)
    check_solved(info[0, 0], choice.held_out, chosen, damp)
    # ⟨W', G W'⟩ is in the error to the share asked for: that to all of it asks for more.
    error = error[0] - 2 * (1 - share) * (new[0] * asked.mT).sum()
    error = error + beyond + of_target - left
    error += (1 - share) ** 2 * left
    new_bias = None
    if affine:
        start = wide.new_zeros(len(wide)) if bias is None else bias.detach().to(wide)
        new_bias = start + wide @ mean - new[0] @ mean[kept] + share * offset
    return Solution(
        weight=new[0],
        bias=new_bias,
        damp=chosen,
        error=ratio(error, energy),
        holdout_error=ratio(choice.held_out, energy),
        condition=float(info[0, 1]),
        path=path_of(mode, chosen) + choice.said_of(ladder),
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

    def centred(self, mean: Tensor) -> Tensor:
        """Return ``Σ (x̂ − mean)(x̂ − mean)ᵀ``, the full matrix."""
        plain = not mean.any()
        return symmetric(self.gram if plain else centre(self.gram, self.total, self.tokens, mean))


@dataclass(frozen=True)
class _Normal:
    """The normal equations of what the features that stay have to restore.

    ``x̃ = x̂ − mean``; a last row, and column, stands for a constant feature 1.
    """

    sums: _Sums
    mean: Tensor
    kept: Tensor
    block: Tensor  # Σ x̃_K x̃_Kᵀ, (n + 1, n + 1)
    removed: Tensor  # Σ x̃_K (W_P x̃_P)ᵀ, (n + 1, d_out)
    energy: Tensor  # Σ |W_P x̃_P + r|²

    @classmethod
    def about(cls, mean: Tensor, weight: Tensor, sums: _Sums, kept: Tensor) -> _Normal:
        n = len(kept)
        gram, edge = sums.centred(mean), sums.total - sums.tokens * mean
        gone = torch.ones_like(mean, dtype=torch.bool).index_fill_(0, kept, False)
        block = gram.new_empty(n + 1, n + 1)
        block[:n, :n] = gram[kept[:, None], kept]
        block[n, :n] = block[:n, n] = edge[kept]
        block[n, n] = sums.tokens
        leaving = weight[:, gone].mT
        every = gram[:, gone] @ leaving
        del gram
        asked = 2 * _about(mean, sums, gone)
        energy = (leaving * (every[gone] + asked)).sum() + sums.energy
        removed = torch.cat([every[kept], edge[None, gone] @ leaving])
        return cls(sums, mean, kept, block, removed, energy)

    def shortfall(self) -> Tensor:
        """Return ``Σ x̃_K rᵀ``, ``(n + 1, d_out)``."""
        cross = _about(self.mean, self.sums, self.kept)
        return torch.cat([cross, self.sums.missing[None]])


def _about(mean: Tensor, sums: _Sums, features: Tensor) -> Tensor:
    """Return ``Σ x̃ rᵀ`` of some features."""
    cross = sums.cross[features]
    return cross.sub_(torch.outer(mean[features], sums.missing)) if mean.any() else cross


def _choose(
    weight: Tensor,
    folds: Sequence[_Sums],
    kept: Tensor,
    affine: bool,
    ladder: Sequence[float],
    shares: tuple[float, float],
) -> Choice:
    """Return the λ and the share of least held-out error, of fits on one fold and the other."""
    means = [sums.means(affine) for sums in folds]
    # About 0 the equations of a fold serve both to fit and to judge.
    fitted = [fold if affine else 0 for fold in range(FOLDS)]
    wide = weight.double()
    about = {
        (fold, at): _Normal.about(means[at][0], wide, folds[fold], kept)
        for fold in range(FOLDS)
        for at in sorted(set(fitted))
    }
    del wide

    def parabola(fold: int, damp: float) -> Tensor:
        # What can be made again is not held for both folds.
        ours, theirs = (about[each, fitted[fold]] for each in (fold, FOLDS - 1 - fold))
        right = torch.cat([ours.removed, ours.shortfall()], 1)[:-1]
        wanted = theirs.shortfall().add_(theirs.removed)
        block, offset = ours.block[:-1, :-1], means[fold][1]
        return Fit(block, right, offset, theirs.block, wanted, theirs.energy).parabola(damp)

    def parabolas(damp: float) -> Tensor:
        return torch.stack([parabola(fold, damp) for fold in range(FOLDS)])

    return choose(parabolas, ladder, *shares)
