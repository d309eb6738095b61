"""Narrow the residual stream: choose the hidden features that stay, and solve every reader.

Features P leave, K stay. A reader ``y = W x + b`` read ``x = norm(h)``, and will read
``x' = norm_K(h_K)``. With r what x' does not give of x::

    y = W_K x' + W r + b,     r = x − x' on K,  x on P

which is a layer that reads ``[x'; r]`` and loses r: :func:`liar_ext.reconstruction.solve.solve`
folds r into ``W_K``. A norm gets new scales and offsets first: ``x' = slope ∘ v + offset`` with v
what it gives over K with the weights that it had. So moments are taken of ``[v; x]``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batches
from liar_ext.calibration.collect import check_finite_weights, collect
from liar_ext.calibration.saved_sums import room_for_sums, split
from liar_ext.calibration.taps import Moments, Squares, Tap
from liar_ext.models.layers import narrow_norm, weight_of
from liar_ext.models.plan import Budget, SitePlan
from liar_ext.models.registry import family_of
from liar_ext.models.residual_stream import Hidden, Source, hidden_of, stream_of
from liar_ext.models.running import device_of
from liar_ext.ops.reference import symmetric
from liar_ext.reconstruction.ridge import check_settings, form_at, ratio
from liar_ext.reconstruction.solve import SiteRow, Solution, solve
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar, showing_bars


@dataclass(frozen=True)
class Narrowing:
    """What :func:`narrow` decided and solved."""

    kept: SitePlan  # the hidden features that stay
    # New weight and bias of readers and norms, by path, in the dtype of their layers.
    weights: dict[str, tuple[Tensor, Tensor | None]]
    rows: list[SiteRow]  # one per norm, or other place where features are read
    source: dict[str, object]  # on the calibration: model type, sequences, tokens, passes
    grid: dict[str, int]  # numbers of features: units, step, kept, kept_at_tile_1


@torch.no_grad()
def narrow(
    model: nn.Module,
    batches: Batches,
    keep: float,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
    tile: int | str = "auto",
    memory: int | None = None,
    progress: bool = False,
) -> Narrowing:
    """Choose the hidden features that stay and solve all their readers; the model isn't changed.

    The features of most energy stay, see :func:`score_hidden`. Every norm gets new scales, and
    offsets where it has a bias, by least squares. Then its readers are solved for their dense
    outputs.

    Parameters
    ----------
    model : nn.Module
        The dense model, of a family with a stream in the table.
    batches : iterable of mapping
        See :func:`liar_ext.calibrate`.
    keep : float
        Fraction of the hidden features that may stay, in (0, 1].
    mode : {"auto", "none", "bias", "linear", "affine"}
        Form of the new weights. Readers without a bias gain none: there ``affine`` is
        ``linear`` and ``bias`` is ``none``. With ``none`` the norms keep their scales, too.
    damp : float or "auto"
        λ, or the choice by held-out error, per norm.
    tile : int or "auto"
        The features that stay are a multiple of this, besides of what the stock class asks for;
        ``"auto"`` as for :class:`liar_ext.Budget`.
    memory : int, optional
        Bytes that sums may take at a time, but at least those of one norm; by default 32 GiB,
        or half of what is free on a device in use. The result has the same bits.
    progress : bool
        Show progress bars.

    Returns
    -------
    Narrowing
        For ``Plan(..., hidden=kept)`` and :func:`liar_ext.apply_plan`.

    Raises
    ------
    InputError
        If the family has no stream, or a fold has no tokens.

    Notes
    -----
    One pass over the batches to choose, and one for the sums of all norms, or of each group that
    fits ``memory``, ``16 (n_kept + hidden)²`` bytes a norm. A solve takes up to nine times the sums
    of its norm. A head that is tied to the embedding is only sliced.

    Source: docs/method.md, section "Hidden size".
    """
    check_settings(mode, damp)
    batches = list(batches)
    check_finite_weights(model)
    hidden = hidden_of(model)
    count = count_kept(hidden, keep, tile)
    each = FOLDS * 8 * (count + hidden.size) ** 2
    room = room_for_sums(model, memory)
    groups = split(hidden.sources, [each] * len(hidden.sources), room)
    repeats = family_of(model).repeats
    titles = [f"narrow, pass {i + 1} of {1 + len(groups)}" for i in range(1 + len(groups))]
    taps = [
        Tap(norm, norm, hidden.size, lambda args, _: args[0], sums=Squares, repeats=repeats)
        for norm in hidden.norms
    ]
    with showing_bars(progress):
        energy = collect(model, batches, taps, title=titles[0])
        kept = score_hidden(energy).argsort(descending=True, stable=True)[:count].sort().values
        solver, rows = _Solver(model, kept, mode, damp), []
        for group, title in zip(groups, titles[1:], strict=True):
            taps = [narrowing_tap(model, source, kept, hidden.size, repeats) for source in group]
            bank = collect(model, batches, taps, title=title)
            for source in Bar(group, desc="solve"):
                # Released at once: the next group is summed in the memory of this one.
                rows.append(solver.solve(source, bank.moments.pop(source.name)))
    grid = {
        "units": hidden.size,
        "step": Budget(keep, tile=tile).step(hidden.size, hidden.multiple_of),
        "kept": count,
        "kept_at_tile_1": count_kept(hidden, keep, 1),
    }
    plan, source = SitePlan(hidden.size, tuple(kept.tolist())), energy.source
    return Narrowing(plan, solver.weights, rows, source | {"passes": len(titles)}, grid)


def count_kept(hidden: Hidden, keep: float, tile: int | str = "auto") -> int:
    """Return how many features stay: at most the fraction ``keep``, on the grid of the tile."""
    step = Budget(keep, tile=tile).step(hidden.size, hidden.multiple_of)
    count = hidden.size if keep == 1.0 else math.floor(keep * hidden.size / step + 1e-9) * step
    if not count:
        raise InputError(
            f"hidden: {keep:.4g} of {hidden.size} features is less than {step}, of which the "
            f"hidden size must be a multiple; raise keep_hidden or lower tile={tile}"
        )
    return count


def score_hidden(bank: Mapping[str, Squares]) -> Tensor:
    """Score the hidden features, ``(hidden,)``: ``Σ_t h_tj² / Σ_t |h_t|²``, averaged over norms.

    A feature of much energy dominates the statistic of every norm, which no reader can compensate.
    """
    energy = torch.stack([squares.second_moment().cpu() for squares in bank.values()])
    whole = energy.sum(1, keepdim=True)
    return (energy / torch.where(whole > 0, whole, 1.0)).mean(0)


def narrowing_tap(
    model: nn.Module, source: Source, kept: Tensor, hidden: int, repeats: bool
) -> Tap:
    """Return where ``[norm_K(h_K); norm(h)]`` of a source is to be had."""
    module = model.get_submodule(source.module)
    here = kept.to(device_of(module))
    if source.norm:
        norm = copy.deepcopy(module)
        narrow_norm(norm, here)

    def take(args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        narrow, whole = args[0][..., here], args[0]
        return torch.cat([norm(narrow), output] if source.norm else [narrow, whole], dim=-1)

    size = len(kept) + hidden
    return Tap(source.name, source.module, size, take, source.first, repeats=repeats)


class _Solver:
    """Solves the sources of one model one after the other, in the order of computation."""

    def __init__(self, model: nn.Module, kept: Tensor, mode: str, damp: float | str) -> None:
        self.model, self.kept, self.mode, self.damp = model, kept, mode, damp
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}  # of the norms

    def solve(self, source: Source, both: Moments) -> SiteRow:
        """Solve a norm and its readers, from the moments of ``[v; x]``."""
        start = time.perf_counter()
        kept = self.kept.to(both.gram.device)
        n, hidden = len(kept), both.d_in - len(kept)
        one = both.gram.new_ones(n)
        solution = Solution(one, None, math.inf, 0.0, 0.0, 1.0, "sliced")
        layers = [self.model.get_submodule(path) for path in source.readers]
        if source.norm and not source.first:
            norm = self.model.get_submodule(source.module)
            if getattr(norm, "weight", None) is not None:
                layers.append(norm)
                if self.mode != "none":
                    solution = self._fit_norm(source.module, norm, both, kept)
        if source.readers:
            scales = self.scales.get(source.module, (one, torch.zeros_like(one)))
            solution = self._solve_readers(source, lost_moments(both, kept, *scales), kept)
        per_feature = sum(layer.weight.numel() for layer in layers) // hidden
        facts = {"dropped_rows": both.dropped_rows, "seconds": time.perf_counter() - start}
        return solution.row(source.name, hidden, n, per_feature, **facts)

    def _fit_norm(self, path: str, norm: nn.Module, both: Moments, kept: Tensor) -> Solution:
        bias = getattr(norm, "bias", None)
        solution = fit_norm(both, kept, bias is not None)
        slope, offset = self.scales[path] = solution.weight, solution.bias
        added = stream_of(self.model).norm_offset
        weight = slope * (norm.weight[kept].double() + added) - added
        new_bias = None if bias is None else slope * bias[kept].double() + offset
        self._set(path, weight, new_bias)
        return solution

    def _solve_readers(self, source: Source, moments: Moments, kept: Tensor) -> Solution:
        readers = [self.model.get_submodule(path) for path in source.readers]
        sizes = [len(weight_of(reader)) for reader in readers]
        wide = torch.cat([weight_of(reader) for reader in readers]).to(moments.gram)
        with_bias = all(reader.bias is not None for reader in readers)
        bias = torch.cat([reader.bias for reader in readers]) if with_bias else None
        mode = form_at(self.mode, with_bias, gains_bias=False)
        both, first = torch.cat([wide[:, kept], wide], dim=1), torch.arange(len(kept))
        solution = solve(both, bias, moments, first, mode=mode, damp=self.damp)
        biases = [None] * len(sizes) if solution.bias is None else solution.bias.split(sizes)
        weights = solution.weight.split(sizes)
        for path, weight, part in zip(source.readers, weights, biases, strict=True):
            self._set(path, weight, part)
        return solution

    def _set(self, path: str, weight: Tensor, bias: Tensor | None) -> None:
        dtype = self.model.get_submodule(path).weight.dtype  # float64 would take twice as much
        self.weights[path] = weight.to(dtype), None if bias is None else bias.to(dtype)


def lost_moments(both: Moments, kept: Tensor, slope: Tensor, offset: Tensor) -> Moments:
    """Return the moments of ``[x'; r]`` from those of ``[v; x]``."""
    n = len(kept)
    gram, total = symmetric(both.gram), both.total.clone()
    gram[:, :n] *= slope[:, None]
    gram[:, :, :n] *= slope
    total[:, :n] *= slope
    # Σ (u + c)(u + c)ᵀ, with c the offset on the first n features.
    tokens = both.tokens[:, None, None]
    gram[:, :n] += offset[:, None] * total[:, None, :]
    gram[:, :, :n] += total[:, :, None] * offset
    gram[:, :n, :n] += tokens * torch.outer(offset, offset)
    total[:, :n] += both.tokens[:, None] * offset
    gram[:, n + kept] -= gram[:, :n]
    gram[:, :, n + kept] -= gram[:, :, :n]
    total[:, n + kept] -= total[:, :n]
    return Moments(gram, total, both.count)


def fit_norm(both: Moments, kept: Tensor, with_offset: bool) -> Solution:
    """Fit scale s and offset c of each feature of a narrowed norm to what the dense norm puts out.

    ``min Σ_t (s_j v_jt + c_j − x_jt)²`` for every j in K; c is 0 without ``with_offset``. They are
    weight and bias of the solution. Errors are relative to ``Σ |x|²``, removed features included.
    """
    n = len(kept)
    here = torch.arange(n, device=kept.device)
    square = both.gram[:, here, here]
    cross = both.gram[:, n + kept, here]
    energy = both.gram.diagonal(dim1=1, dim2=2)[:, n:].sum(1)
    v, x, tokens = both.total[:, :n], both.total[:, n + kept], both.tokens[:, None]
    wanted = both.gram[:, n + kept, n + kept]

    def fit(fold: Tensor) -> tuple[Tensor, Tensor]:
        count = tokens[fold].sum()
        mean, goal = v[fold].sum(0) / count, x[fold].sum(0) / count
        if not with_offset:
            mean, goal = torch.zeros_like(mean), torch.zeros_like(goal)
        spread = square[fold].sum(0) - count * mean.square()
        together = cross[fold].sum(0) - count * mean * goal
        # A feature without spread has no slope to fit.
        slope = torch.where(spread > 1e-12 * square[fold].sum(0), together / spread, 1.0)
        return slope, goal - slope * mean

    def error(fold: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        """Return Σ (s v + c − x)² over K, and Σ x² over P."""
        left = slope.square() * square + tokens * offset.square() + wanted
        left += 2 * (slope * offset * v - slope * cross - offset * x)
        return (left.sum(1) + energy - wanted.sum(1))[fold].sum()

    whole = torch.arange(FOLDS, device=kept.device)
    slope, offset = fit(whole)
    held_out = sum(error(whole[1 - f : 2 - f], *fit(whole[f : f + 1])) for f in range(FOLDS))
    errors = (ratio(each, energy.sum()) for each in (error(whole, slope, offset), held_out))
    return Solution(slope, offset, 0.0, *errors, 1.0, "norm only, least squares")
