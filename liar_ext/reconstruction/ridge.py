"""The ridge system of one consumer in memory: its sums over tokens, and solves with any λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.moments import Moments, all_finite, centre
from liar_ext.models.plan import MODES
from liar_ext.models.sites import Site
from liar_ext.ops.reference import symmetric
from liar_ext.reconstruction.ladder import Choice, Equations, Fit, choose, least_held_out, rows_of
from liar_ext.system.errors import InputError

WITH_BIAS = ("bias", "affine")
DAMP_LADDER = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 3e-1, 1.0, math.inf)
BOTH = list(range(FOLDS))
# x̂, the residual r and what each token counts, bool or a number: a row per token.
Tokens = tuple[Tensor, Tensor, Tensor]
PAIRED_BYTES = 64 << 20  # sums of both folds up to here are solved in one call


def check_settings(mode: str, damp: float | str) -> None:
    """Raise InputError unless ``mode`` and ``damp`` are ones that a solve knows."""
    if mode not in MODES:
        raise InputError(f"reconstruct: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if damp != "auto" and not (isinstance(damp, float | int) and damp >= 0):
        raise InputError(f'reconstruct: damp must be "auto" or a number >= 0, got {damp!r}')


def form_at(mode: str, has_bias: bool, gains_bias: bool = True) -> str:
    """Return the form of one consumer: ``auto`` is affine if there is a bias to carry it.

    A consumer that has none and can't gain one gets the form without.
    """
    if mode == "auto":
        return "affine" if has_bias else "linear"
    if has_bias or gains_bias:
        return mode
    return {"affine": "linear", "bias": "none"}.get(mode, mode)


def form_of_expert(mode: str, has_bias: bool, moments: Moments) -> str:
    """Return the form of one expert's consumer, which can't gain a bias.

    Nothing is fitted if no token of one fold reaches it: nothing would tell of a λ.
    """
    return "none" if (moments.tokens == 0).any() else form_at(mode, has_bias, gains_bias=False)


def damp_ladder(damp: float | str) -> list[float]:
    """Return the λ to choose from."""
    return list(DAMP_LADDER) if damp == "auto" else [float(damp)]


def ratio(error: Tensor, energy: Tensor) -> float:
    """Return ``error / energy``, or 0 if the output of the consumer is zero.

    What isn't finite gives NaN, which the report shows, and never 0.
    """
    if not (torch.isfinite(error) and torch.isfinite(energy)):
        return math.nan
    return max(0.0, float(error / energy)) if energy > 0 else 0.0


@dataclass
class Residual:
    """Float64 sums over tokens of the residual ``r = y* − (W x̂ + b)``, in two folds."""

    cross: Tensor  # Σ_t w_t x̂_t r_tᵀ, (2, d_in, d_out)
    total: Tensor  # Σ_t w_t r_t, (2, d_out)
    energy: Tensor  # Σ_t w_t |r_t|², (2,)

    @classmethod
    def zeros(cls, d_in: int, d_out: int, *, device: str | torch.device = "cpu") -> Residual:
        """Return the sums over no tokens, which are also those of the consumer's own target."""
        shapes = (d_in, d_out), (d_out,), ()
        return cls(*(torch.zeros(FOLDS, *s, dtype=torch.float64, device=device) for s in shapes))

    def update(self, x: Tensor, r: Tensor, fold: int, weight: Tensor) -> None:
        """Add tokens to a fold: x̂, r of one dtype, and which rows are in use or what each counts.

        Rows in use must be finite.
        """
        unused, count = torch.zeros_like(self.cross[fold, :, 0]), self.energy.new_zeros(2)
        ops.gram_update_(self.cross[fold], unused, count, x, r, weight)
        used = weight.bool()
        wide, scale = r.detach()[used].double(), weight[used].double()
        self.total[fold] += scale @ wide
        self.energy[fold] += scale @ wide.square().sum(1)


@dataclass
class LayerSums:
    """Sums of x̂ and r over the tokens of one site, and how many tokens there were."""

    moments: Moments
    residual: Residual
    rows: int = 0

    @classmethod
    def zeros(cls, site: Site, device: torch.device) -> LayerSums:
        """Return the sums over no tokens."""
        residual = Residual.zeros(site.d_in, site.d_out, device=device)
        return cls(Moments.zeros(site.d_in, device=device), residual)

    def add(self, rows: Tokens, fold: int) -> None:
        """Add tokens to a fold; those with a value that isn't finite are left out and counted."""
        (x, r, weight), moments = rows, self.moments
        self.rows += int((weight > 0).sum())
        x = x.to(r.dtype)
        if not (all_finite(x) and all_finite(r)):
            usable = torch.isfinite(x).all(-1) & torch.isfinite(r).all(-1)
            moments.count[fold, 1] += (weight.bool() & ~usable).sum()
            weight = weight * usable
        moments.update(x, fold, weight)
        self.residual.update(x, r, fold, weight)


@dataclass(frozen=True)
class System:
    """The ridge system of one consumer, in memory.

    Parameters are those of :func:`liar_ext.reconstruction.solve.solve`. The weight may be of any
    dtype, and no float64 copy of it is held.
    """

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    kept: Tensor
    target: Residual | None = None
    mode: str = "auto"
    by_blocks: ClassVar[bool] = False

    @property
    def form(self) -> str:
        """Form of the new weight."""
        return form_at(self.mode, self.bias is not None)

    @property
    def affine(self) -> bool:
        """Whether the bias takes part."""
        return self.form in WITH_BIAS

    def means(self, folds: list[int]) -> tuple[Tensor, Tensor]:
        """Return the means of x̂ and r over some folds; the plain form centres about 0."""
        total = self.moments.total[folds].double().sum(0)
        missing = total.new_zeros(len(self.weight))
        if self.target is not None:
            missing = self.target.total[folds].sum(0)
        if not self.affine:
            return torch.zeros_like(total), torch.zeros_like(missing)
        tokens = self.moments.tokens[folds].sum()
        return total / tokens, missing / tokens

    def choose(self, ladder: Sequence[float], step: tuple[float, float]) -> Choice:
        """Return the λ and the step size of least held-out error."""
        if self.target is not None or self.by_blocks:
            return self._cross_validated(ladder, step)
        held_out = self._held_out(ladder)
        best = least_held_out(held_out, ladder)
        return Choice(ladder[best], 0.0, held_out[:, best].sum(), len(ladder))

    def _cross_validated(self, ladder: Sequence[float], step: tuple[float, float]) -> Choice:
        """Choose by fits on one fold that are judged on the other."""
        means = [self.means([fold]) for fold in BOTH]
        # About 0 the equations of a fold serve both to fit and to judge.
        equations = {
            (fold, at): self.equations([fold], means[at][0], self.affine and fold != at)
            for fold in BOTH
            for at in (BOTH if self.affine else [0])
        }
        square = self.new_square()

        def parabolas(damp: float) -> Tensor:
            found = []
            for fold, (_, offset) in enumerate(means):
                pair = (equations[each, fold * self.affine] for each in (fold, FOLDS - 1 - fold))
                found.append(Fit(*pair, offset, square).parabola(damp))
            return torch.stack(found)

        return choose(parabolas, ladder, *step, whole=self.target is None)

    def new_square(self) -> Tensor:
        """Return room for a factor, ``(n, n)``."""
        n = len(self.kept)
        return torch.empty(n, n, dtype=torch.float64, device=self.moments.gram.device)

    def equations(self, folds: list[int], mean: Tensor, judging: bool) -> Equations:
        """Return what the kept features have to restore over the tokens of folds: here of one.

        If they are for ``judging`` alone, R₀ + R₁ takes the place of both.
        """
        (fold,) = folds
        wide, kept, n, h = self.weight.double(), self.kept, len(self.kept), len(self.weight)
        sums = self.moments.gram, self.moments.total, self.moments.tokens
        gram, total, tokens = (each[fold] for each in sums)
        gram = symmetric(centre(gram, total, tokens, mean) if mean.any() else gram)
        missing = self.target.total[fold]
        edge = total - tokens * mean
        gone = torch.ones_like(mean, dtype=torch.bool).index_fill_(0, kept, False)
        block = gram.new_empty(n + 1, n + 1)
        block[:n, :n] = gram[kept[:, None], kept]
        block[n, :n] = block[:n, n] = edge[kept]
        block[n, n] = tokens
        leaving = wide[:, gone].mT
        every = gram[:, gone] @ leaving
        del gram

        def cross(features: Tensor) -> Tensor:
            found = self.target.cross[fold][features]
            return found.sub_(torch.outer(mean[features], missing)) if mean.any() else found

        energy = (leaving * (every[gone] + 2 * cross(gone))).sum() + self.target.energy[fold]
        right = block.new_empty(n + 1, h if judging else 2 * h)
        right[:n, :h], right[n, :h] = every[kept], edge[gone] @ leaving
        del every
        asked = torch.cat([cross(kept), missing[None]])
        if judging:
            right += asked
        else:
            right[:, h:] = asked
        return Equations(rows_of(block), [(slice(0, h), right)], energy)

    def solve(self, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Solve on both folds with the λ and the step size that were chosen.

        Returns W', its error, ``tr(W G Wᵀ)``, and code and condition of the operator.
        """
        # In the order that has fewest matrices at a time: each may take a gigabyte.
        gram, total, tokens = self.moments.pooled()
        wide, kept, (mean, offset) = self.weight.double(), self.kept, self.means(BOTH)
        plain = not self.affine and self.target is not None  # whose products give the energy, too
        energy, damps = None, gram.new_tensor([math.inf, choice.damp], dtype=torch.float64)
        if not plain:  # that of keeping nothing is the error
            energy = ops.reconstruct(wide, gram, kept[:0], damps[:1], errors_only=True)[1][0]
        if self.affine:
            gram = centre(gram, total, tokens, mean)
        if self.target is None:
            new, error, _, info = ops.reconstruct(wide, gram, kept, damps[1:])
            return new[0], error[0], energy, *info[0]
        gram, rest = symmetric(gram), 1 - choice.step_size
        own = gram @ wide.mT
        energy = (wide.mT * own).sum() if plain else energy
        # Centred cross-sums of the residual; the error to judge by is that to all of it.
        asked = self.target.cross.sum(0).sub_(torch.outer(total, offset))
        beyond = (wide.mT * (own + 2 * asked)).sum()
        left = tokens * offset.square().sum()  # which the mean holds
        cross, asked = own.add_(choice.step_size * asked), asked[kept]
        new, error, _, info = ops.reconstruct(wide, gram, kept, damps[1:], cross=cross)
        # ⟨W', G W'⟩ is in the error to the step that was taken: the whole one asks for more.
        error = error[0] - 2 * rest * (new[0] * asked.mT).sum()
        error = error + beyond + self.target.energy.sum() + (rest**2 - 1) * left
        return new[0], error, energy, *info[0]

    def _held_out(self, ladder: Sequence[float]) -> Tensor:
        """Return the held-out error by fold and λ, ``(2, λ)``."""
        wide, damps = self.weight.double(), torch.tensor(ladder, dtype=torch.float64)
        pairs = (self._fit_and_judge(fold) for fold in BOTH)
        # Folds in one call go side by side where that is sooner, but take copies of the sums.
        groups = zip(pairs) if self.moments.gram.nbytes > PAIRED_BYTES else [tuple(pairs)]
        held_out = []
        for group in groups:
            grams, judged = (
                each[0][None] if len(each) == 1 else torch.stack(each)
                for each in zip(*group, strict=True)
            )
            weights, kept = (each.expand(len(group), *each.shape) for each in (wide, self.kept))
            given = weights, grams, kept, damps.to(wide.device), judged
            held_out.append(ops.reconstruct(*given, errors_only=True)[2])
        return torch.cat(held_out)

    def _fit_and_judge(self, fold: int) -> tuple[Tensor, Tensor]:
        """Return the Gram matrix of a fold, and that of the other one to judge the fit by."""
        pair, sums = (fold, FOLDS - 1 - fold), self.moments
        if not self.affine:
            return tuple(sums.gram[each] for each in pair)
        mean = sums.total[fold] / sums.tokens[fold]
        return tuple(centre(sums.gram[i], sums.total[i], sums.tokens[i], mean) for i in pair)
