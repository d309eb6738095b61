"""The ridge system of one consumer: its sums over tokens, and solves with any λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.taps import Moments, all_finite, centre
from liar_ext.models.plan import MODES
from liar_ext.models.sites import Site
from liar_ext.ops.reference import NOT_FINITE, symmetric
from liar_ext.reconstruction.ladder import (
    Choice,
    Equations,
    Fit,
    Rows,
    choose,
    half_product,
    in_file,
    least_held_out,
    rows_of,
    slices,
)
from liar_ext.system.errors import InputError

WITH_BIAS = ("bias", "affine")
DAMP_LADDER = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 3e-1, 1.0, math.inf)
BOTH = list(range(FOLDS))
# x̂, the residual r and what each token counts, bool or a number: a row per token.
Tokens = tuple[Tensor, Tensor, Tensor]
OUTPUTS = 256  # solved at a time in a file
PAIRED_BYTES = 64 << 20  # sums of both folds up to here are solved in one call


def check_settings(mode: str, damp: float | str) -> None:
    """Raise InputError unless a solve knows ``mode`` and ``damp``."""
    if mode not in MODES:
        raise InputError(f"reconstruct: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if damp != "auto" and not (isinstance(damp, float | int) and damp >= 0):
        raise InputError(f'reconstruct: damp must be "auto" or a number >= 0, got {damp!r}')


def form_at(mode: str, has_bias: bool, gains_bias: bool = True) -> str:
    """Return the form of one consumer; one that has no bias and can't gain one, that without."""
    if mode == "auto":
        return "affine" if has_bias else "linear"
    if has_bias or gains_bias:
        return mode
    return {"affine": "linear", "bias": "none"}.get(mode, mode)


def form_of_expert(mode: str, has_bias: bool, moments: Moments) -> str:
    """Return the form of one expert's consumer: none if no token of one fold reaches it."""
    return "none" if (moments.tokens == 0).any() else form_at(mode, has_bias, gains_bias=False)


def damp_ladder(damp: float | str) -> list[float]:
    """Return the λ to choose from."""
    return list(DAMP_LADDER) if damp == "auto" else [float(damp)]


def ratio(error: Tensor, energy: Tensor) -> float:
    """Return ``error / energy``, 0 if the energy is, and NaN for what isn't finite."""
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
        """Return the sums over no tokens."""
        shapes = (d_in, d_out), (d_out,), ()
        return cls(*(torch.zeros(FOLDS, *s, dtype=torch.float64, device=device) for s in shapes))

    def update(self, x: Tensor, r: Tensor, fold: int, weight: Tensor) -> None:
        """Add tokens to a fold: x̂, r of one dtype, finite in rows that count."""
        unused, count = torch.zeros_like(self.cross[fold, :, 0]), self.energy.new_zeros(2)
        ops.gram_update_(self.cross[fold], unused, count, x, r, weight)
        used = weight.bool()
        wide, scale = r.detach()[used].double(), weight[used].double()
        self.total[fold] += scale @ wide
        self.energy[fold] += scale @ wide.square().sum(1)


@dataclass
class LayerSums:
    """Sums of x̂ and r over the tokens of one site, and their number."""

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
    """The ridge system of one consumer, see :func:`liar_ext.reconstruction.solve.solve`.

    The weight may be of any dtype, and no float64 copy of it is held.
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
        if not self.affine:
            return torch.zeros_like(total), missing
        if self.target is not None:
            missing = self.target.total[folds].sum(0)
        tokens = self.moments.tokens[folds].sum()
        return total / tokens, missing / tokens

    def choose(self, ladder: Sequence[float], step: tuple[float, float]) -> Choice:
        """Return the λ and the step size of least held-out error."""
        if self.target is None and not self.by_blocks:
            held_out = self._held_out(ladder)
            best = least_held_out(held_out, ladder)
            return Choice(ladder[best], 0.0, held_out[:, best].sum(), len(ladder))
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
        """Return what the kept features have to restore over the tokens of one fold.

        If they are for ``judging`` alone, R₀ + R₁ takes the place of both.
        """
        (fold,) = folds
        wide, kept, n, h = self.weight.double(), self.kept, len(self.kept), len(self.weight)
        sums = self.moments
        gram, total, tokens = sums.gram[fold], sums.total[fold], sums.tokens[fold]
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
        """Solve on both folds: W', its error, ``tr(W G Wᵀ)``, code and condition of the solve."""
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


class About:
    """Sums over some folds, of ``x̃ = x − mean`` and of a constant feature 1 after it.

    ``[[G̃, e], [eᵀ, n]]``, with ``G̃ = G − s meanᵀ − mean eᵀ`` and ``e = s − n mean``; it is never
    there as a whole.
    """

    def __init__(self, moments: Moments, folds: list[int], mean: Tensor) -> None:
        self.grams = [moments.gram[fold] for fold in folds]  # lower triangles
        self.total, self.mean = moments.total[folds].double().sum(0), mean
        self.tokens = moments.tokens[folds].sum()

    def rows(self, index: Tensor) -> Rows:
        """Return the block rows for an ascending ``index`` of features, and the constant."""
        n, edge = len(index), self.total - self.tokens * self.mean

        def gathered(start: int, stop: int) -> Tensor:
            at, to = index[start:stop], index[:stop]
            found = self.total.new_empty(stop - start, stop)
            block = found[: len(at), : len(to)]
            block.zero_()
            for gram in self.grams:
                block += gram[at].index_select(1, to)
            block.addr_(self.total[at], self.mean[to], alpha=-1)
            block.addr_(self.mean[at], edge[to], alpha=-1)
            corner = block[:, start:]
            corner.copy_(symmetric(corner))
            if stop > n:
                found[-1, :-1], found[-1, -1] = edge[to], self.tokens
                found[:-1, -1] = edge[at]
            return found

        return gathered

    def product(self, right: Tensor) -> Tensor:
        """Return its product with ``right``, ``(d + 1, columns)``."""
        rows, product = self.rows(torch.arange(len(self.mean))), torch.zeros_like(right)
        for here in slices(len(right)):
            start = here.start
            block = rows(here.start, here.stop)
            torch.addmm(product[here], block, right[: here.stop], out=product[here])
            if start:
                above, left = product[:start], block[:, :start]
                torch.addmm(above, left.mT, right[here], out=above)
        return product


class SystemInFile(System):
    """The same in little memory: one square in a file, all else by blocks; equal but for rounding.

    Blocks of rows are gathered from the sums, and centred, whenever they are read. What is
    factored, and the right-hand sides, lie in files.
    """

    by_blocks = True

    def new_square(self) -> Tensor:
        """Return room for a factor."""
        return in_file(len(self.kept), len(self.kept))

    def solve(self, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Solve on both folds."""
        mean, offset = self.means(BOTH)
        equations = self.equations(BOTH, mean, False)
        fit = Fit(equations, equations, offset, self.new_square())
        factor, solved = fit.factor(choice.damp)
        new = torch.empty(len(self.weight), len(self.kept), dtype=torch.float64)
        error = energy = torch.zeros((), dtype=torch.float64)
        size = choice.step_size
        powers = torch.tensor([1.0, size, size**2], dtype=torch.float64)
        sums = About(self.moments, BOTH, torch.zeros_like(mean))
        rows = sums.rows(torch.arange(len(mean)))
        for here, change, parabola in fit.changes(factor) if solved else ():
            new[here] = self.weight[here][:, self.kept]
            count, turned = here.stop - here.start, self._turned(here)
            if factor is not None:
                new[here] += change[:-1, :count].mT
                if change.shape[1] > count:
                    new[here] += size * change[:-1, count:].mT
            error = error + parabola @ powers
            energy = energy + 2 * (turned * half_product(rows, turned)).sum()
        finite = bool(torch.isfinite(error + energy))
        code = torch.tensor(1.0 if not solved else 0.0 if finite else NOT_FINITE)
        diagonal = torch.ones(1).double() if factor is None else factor.diagonal()
        return new, error, energy, code, (diagonal.max() / diagonal.min()) ** 2

    def equations(self, folds: list[int], mean: Tensor, judging: bool) -> Equations:
        """Return what the kept features have to restore over the tokens of folds."""
        about, d, n = About(self.moments, folds, mean), len(mean), len(self.kept)
        stays = torch.cat([self.kept, self.kept.new_tensor([d])])
        right, energy = [], torch.zeros((), dtype=torch.float64)
        for here in slices(len(self.weight), OUTPUTS):
            leaving = self._turned(here).index_fill_(0, stays, 0.0)
            removed = about.product(leaving)
            energy += (leaving * removed).sum()
            parts = [removed[stays]]
            if self.target is not None:
                missing = self.target.total[folds][:, here].sum(0)
                cross = torch.cat([self.target.cross[folds, :, here].sum(0), missing[None]])
                cross[:d].addr_(mean, missing, alpha=-1)
                energy += 2 * (leaving * cross).sum()
                parts.append(cross[stays])
            parts = [sum(parts)] if judging else parts
            room = in_file(n + 1, sum(part.shape[1] for part in parts))
            right.append((here, torch.cat(parts, 1, out=room)))
        if self.target is not None:
            energy += self.target.energy[folds].sum()
        return Equations(about.rows(self.kept), right, energy)

    def _turned(self, here: slice) -> Tensor:
        """Return the weights of some outputs, ``(d + 1, outputs)``: none are of the constant."""
        turned = torch.zeros(self.weight.shape[1] + 1, here.stop - here.start).double()
        turned[:-1] = self.weight[here].mT
        return turned
