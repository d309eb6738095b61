"""The same solves in little memory: one square in a file, and all else by blocks.

Beside the sums, which stay where they are, a solve of d features has no d² numbers in memory.
Of the sums blocks of rows are gathered, and centred, whenever they are read. What is factored,
``G_KK + Λ``, and the right-hand sides lie in files without a name, mapped into memory, which the
operating system writes out where it needs the room. Given the factor the outputs of a consumer are
solved independently of each other, some hundred at a time.

λ is chosen by Cholesky factors (:mod:`liar_ext.reconstruction.ladder`), and the last solve is a
:class:`~liar_ext.reconstruction.ladder.Fit` on both folds, judged on both. So results are those of
:mod:`liar_ext.reconstruction.ridge` and :mod:`liar_ext.reconstruction.targets` but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from liar_ext.calibration.moments import Moments, check_finite, check_folds
from liar_ext.data.batches import FOLDS
from liar_ext.reconstruction.ladder import (
    Rows,
    change_by,
    choose,
    error_of_shares,
    factor_with_damp,
    half_product,
    slices,
)
from liar_ext.reconstruction.out_of_core import About, in_file
from liar_ext.reconstruction.result import (
    NOT_FINITE,
    Solution,
    check_solved,
    least_held_out,
    path_of,
    ratio,
)
from liar_ext.reconstruction.settings import WITH_BIAS, check_settings, damp_ladder, form_at
from liar_ext.reconstruction.targets import Shortfall

OUTPUTS = 256  # solved at a time


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    kept: Tensor,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
) -> Solution:
    """Do what :func:`liar_ext.reconstruction.ridge.solve` does."""
    check_settings(mode, damp)
    mode = form_at(mode, bias is not None)
    check_folds(moments)
    unsolved = mode in ("none", "bias") or len(kept) == weight.shape[1]
    ladder = [math.inf] if unsolved else damp_ladder(damp)
    problem = _Problem(weight, bias, moments, None, kept, mode in WITH_BIAS)
    parabolas = partial(_parabolas, problem.fits())
    held_out = torch.stack([parabolas(each)[:, 0] for each in ladder], 1)
    del parabolas  # and files
    best = least_held_out(held_out, ladder)
    return problem.solution(ladder[best], 0.0, held_out[:, best], damp, path_of(mode, ladder[best]))


def drop(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> Solution:
    """Do what :func:`liar_ext.reconstruction.ridge.drop` does."""
    problem = _Problem(weight, bias, moments, None, kept, False)
    return problem.solution(math.inf, 0.0, None, math.inf, "drop, a fold has no tokens")


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
    """Do what :func:`liar_ext.reconstruction.targets.solve_towards` does."""
    check_folds(moments)
    check_finite(shortfall.cross, shortfall.total, shortfall.energy)
    ladder = damp_ladder(damp)
    problem = _Problem(weight, bias, moments, shortfall, kept, mode == "affine")
    choice = choose(partial(_parabolas, problem.fits()), ladder, *shares)
    path = path_of(mode, choice.damp) + choice.said_of(ladder)
    return problem.solution(choice.damp, choice.share, choice.held_out, damp, path)


@dataclass(frozen=True)
class _Outputs:
    """Of some outputs, what the features that stay have to restore."""

    right: Tensor  # [Σ x̃_K (W_P x̃_P)ᵀ, Σ x̃_K rᵀ], (n + 1, 2 outputs), or the first half alone
    energy: Tensor  # Σ |W_P x̃_P + r|²

    def wanted(self, outputs: int) -> Tensor:
        """Return the right-hand side of all of it."""
        return sum(self.right.split(outputs, 1))


@dataclass(frozen=True)
class _Fit:
    """A solve for all outputs on some folds, judged on some."""

    block: Rows  # G̃_KK, then the constant
    outputs: list[_Outputs]
    offset: Tensor  # the change of the bias by all of the target, (d_out,)
    judge: Rows
    judged: list[_Outputs]
    square: Tensor  # (n, n), for the factor

    def factor(self, damp: float) -> tuple[Tensor | None, bool]:
        """Return the factor, if this λ needs one, and whether it has a solution."""
        n = len(self.square)
        if not n or math.isinf(damp):
            return None, True
        for rows in slices(n):
            self.square[rows, : rows.stop] = self.block(rows.start, rows.stop)
        return self.square, factor_with_damp(self.square, damp)

    def parts(self, factor: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield outputs, the change of their weights, and its error as a parabola of the share."""
        columns = slices(len(self.offset), OUTPUTS)
        for here, mine, other in zip(columns, self.outputs, self.judged, strict=True):
            count = here.stop - here.start
            offset = self.offset[here][: mine.right.shape[1] - count]
            change, wanted = change_by(factor, mine.right[:-1], offset), other.wanted(count)
            yield here, change, error_of_shares(change, self.judge, wanted, other.energy)


def _parabolas(fits: list[_Fit], damp: float) -> Tensor:
    """Return the held-out errors of each fit as parabolas of the share, ``(2, 3)``."""
    found = []
    for fit in fits:
        factor, solved = fit.factor(damp)
        nothing = torch.full((3,), math.nan, dtype=torch.float64)
        found.append(sum(error for *_, error in fit.parts(factor)) if solved else nothing)
    return torch.stack(found)


@dataclass(frozen=True)
class _Problem:
    """One consumer, the sums it is solved by, and what stays."""

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    shortfall: Shortfall | None
    kept: Tensor
    affine: bool

    def fits(self) -> list[_Fit]:
        """Return the solves on one fold that are judged on the other."""
        square, equations = in_file(len(self.kept), len(self.kept)), {}
        found = []
        for fold in range(FOLDS):
            mean, offset = self._means([fold])
            sides = []
            for at in (fold, FOLDS - 1 - fold):
                about = About.of(self.moments, [at], mean)
                # About 0 the equations of a fold serve both to fit and to judge.
                key = (at, fold if self.affine else 0)
                if key not in equations:
                    equations[key] = list(self._equations(about, [at]))
                sides += [about.rows(self.kept), equations[key]]
            found.append(_Fit(sides[0], sides[1], offset, sides[2], sides[3], square))
        return found

    def solution(
        self,
        damp: float,
        share: float,
        held_out: Tensor | None,
        asked: float | str,
        path: str,
    ) -> Solution:
        """Solve on both folds; ``held_out`` is the error of that λ by fold, None for this one's."""
        folds, square = list(range(FOLDS)), in_file(len(self.kept), len(self.kept))
        mean, offset = self._means(folds)
        about = About.of(self.moments, folds, mean)
        rows, outputs = about.rows(self.kept), list(self._equations(about, folds))
        fit = _Fit(rows, outputs, offset, rows, outputs, square)
        factor, solved = fit.factor(damp)
        new = torch.empty(len(self.weight), len(self.kept), dtype=torch.float64)
        error = energy = torch.zeros((), dtype=torch.float64)
        for here, change, parabola in fit.parts(factor) if solved else ():
            new[here] = self.weight.detach()[here][:, self.kept]
            if factor is not None:
                count = here.stop - here.start
                new[here] += change[:-1, :count].mT
                if change.shape[1] > count:
                    new[here] += share * change[:-1, count:].mT
            error = error + parabola @ torch.tensor([1.0, share, share**2], dtype=torch.float64)
            energy = energy + self._energy(here)
        if held_out is not None:
            finite = bool(torch.isfinite(error + energy))
            code = torch.tensor(1 if not solved else 0 if finite else NOT_FINITE)
            check_solved(code, held_out, damp, asked)
        else:
            held_out = error
        new_bias = None
        if self.affine:
            start = 0.0 if self.bias is None else self.bias.detach().double()
            new_bias = start + self._at_mean(mean) - new @ mean[self.kept] + share * offset
        diagonal = torch.ones(1).double() if factor is None else factor.diagonal()
        return Solution(
            weight=new,
            bias=new_bias,
            damp=damp,
            error=ratio(error, energy),
            holdout_error=ratio(held_out.sum(), energy),
            condition=float((diagonal.max() / diagonal.min()) ** 2),
            path=path,
            share=share,
        )

    def _means(self, folds: list[int]) -> tuple[Tensor, Tensor]:
        """Return the means of x̂ and r over some folds; the plain form centres about 0."""
        scale = 1 / self.moments.tokens[folds].sum() if self.affine else 0.0
        missing = self.weight.new_zeros(len(self.weight)).double()
        if self.shortfall is not None:
            missing = self.shortfall.total[folds].sum(0)
        return self.moments.total[folds].double().sum(0) * scale, missing * scale

    def _equations(self, about: About, folds: list[int]) -> Iterator[_Outputs]:
        """Yield what has to be restored, for some outputs at a time."""
        d, n = len(about.mean), len(self.kept)
        stays = torch.cat([self.kept, self.kept.new_tensor([d])])
        for here in slices(len(self.weight), OUTPUTS):
            leaving = self._turned(here).index_fill_(0, stays, 0.0)
            removed = about.product(leaving)
            energy, parts = (leaving * removed).sum(), [removed[stays]]
            if self.shortfall is not None:
                missing = self.shortfall.total[folds][:, here].sum(0)
                cross = torch.cat([self.shortfall.cross[folds, :, here].sum(0), missing[None]])
                cross[:d].addr_(about.mean, missing, alpha=-1)
                energy = energy + 2 * (leaving * cross).sum()
                energy = energy + (0 if here.start else self.shortfall.energy[folds].sum())
                parts.append(cross[stays])
            right = in_file(n + 1, sum(part.shape[1] for part in parts))
            yield _Outputs(torch.cat(parts, 1, out=right), energy)

    def _turned(self, here: slice) -> Tensor:
        """Return the weights of some outputs, ``(d + 1, outputs)``: none are of the constant."""
        turned = torch.zeros(self.weight.shape[1] + 1, here.stop - here.start).double()
        turned[:-1] = self.weight.detach()[here].mT
        return turned

    def _energy(self, here: slice) -> Tensor:
        """Return ``Σ |W x̂|²`` of some outputs."""
        zero = torch.zeros_like(self.moments.total[0])
        about = About.of(self.moments, list(range(FOLDS)), zero.double())
        turned = self._turned(here)
        rows = about.rows(torch.arange(self.weight.shape[1]))
        return 2 * (turned * half_product(rows, turned)).sum()

    def _at_mean(self, mean: Tensor) -> Tensor:
        """Return ``W mean``."""
        weight = self.weight.detach()
        return torch.cat([weight[here].double() @ mean for here in slices(len(weight), OUTPUTS)])
