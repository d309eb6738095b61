"""What the outputs of the experts that stay are multiplied by, and whether that helps the model.

With A and c of :mod:`liar_ext.selection.whole_experts`, least squares bring the layer's output
nearest to the dense one, y::

    s = 1 + (A + Λ)⁻¹ (c − A 1)

Such an output is too short along y, by ``β = s·c / Σ_t |y_t|² < 1``. Divided by β the error is
uncorrelated with y; divided by √β, the output is about as long as y. Which of these is best, or
s = 1, the whole model decides: each way is fitted on the tokens of one fold, and run on the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch
from liar_ext.calibration.divergence import Divergence
from liar_ext.calibration.taps import watched
from liar_ext.models.sites import Site
from liar_ext.models.whole import called_at, choice_of, reroute, router_of
from liar_ext.reconstruction.ladder import least_held_out
from liar_ext.reconstruction.ridge import damp_ladder, ratio
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.system.distributed import rank, world_size

# Ways to scale, the first of which is best if several are: by which power of β scales are divided.
PLAIN = "as they are"
POWERS = {"scaled": 0.0, "scaled, as long": 0.5, "scaled, unbiased": 1.0}
JUDGED = 16  # sequences of each fold that a way is judged on


@dataclass(frozen=True)
class LayerTokens:
    """What a layer of experts does with tokens, as much of it as judges any set of experts."""

    site: Site  # the first expert
    router: nn.Module
    choice: tuple[Tensor, ...]  # what the router is called with beside the tokens
    logits: Tensor  # (tokens, experts), the router's
    routed: Tensor  # (tokens, experts) float64, weights r of the dense layer
    products: Tensor  # (tokens, experts, experts) float64, Φ
    fold: Tensor  # (tokens,) int64

    def sums(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and c of the experts ``kept``, ``(2, kept, kept)`` and ``(2, kept)``."""
        n, size = len(kept), self.site.experts
        experts = self.site.wiring.experts
        weight, place = reroute(self.router, self.logits, kept, experts, self.choice)
        weight, chosen = weight.double(), kept[place]
        cross = weight * self._reached.gather(1, chosen)
        index = chosen[:, :, None] * size + chosen[:, None, :]
        pairs = self.products.flatten(1).gather(1, index.flatten(1)).view_as(index)
        pairs = weight[:, :, None] * weight[:, None, :] * pairs
        fold = self.fold[:, None]
        c = cross.new_zeros(FOLDS * n).index_add_(0, (fold * n + place).flatten(), cross.flatten())
        at = (fold[:, :, None] * n + place[:, :, None]) * n + place[:, None, :]
        a = cross.new_zeros(FOLDS * n * n).index_add_(0, at.flatten(), pairs.flatten())
        return a.view(FOLDS, n, n), c.view(FOLDS, n)

    @cached_property
    def _reached(self) -> Tensor:
        """``Φ_t r_t``, the products of each expert's output and the layer's, (tokens, experts)."""
        return torch.bmm(self.products, self.routed[:, :, None])[:, :, 0]

    @property
    def energy(self) -> Tensor:
        """Σ_t |y_t|² by fold, ``(2,)``."""
        each = (self.routed * self._reached).sum(1)
        return each.new_zeros(FOLDS).index_add_(0, self.fold, each)


@dataclass(frozen=True)
class Scales:
    """Scales of the experts of a layer that stay, by one way."""

    by_fold: tuple[Tensor, ...]  # fitted on the tokens of each fold, (kept,) float64
    both: Tensor  # fitted on all, (kept,) float64
    facts: dict[str, object]  # what a row of the report says of them


@dataclass(frozen=True)
class Chosen:
    """The experts of a layer that stay, and their scales by each way."""

    site: Site  # the first expert
    kept: Tensor
    ways: dict[str, Scales]
    seconds: float


def fit_ways(tokens: LayerTokens, kept: Tensor, mode: str, damp: float | str) -> dict[str, Scales]:
    """Return the scales of a layer by each way; without experts that leave, or mode, by one."""
    energy, sums = tokens.energy, tokens.sums(kept)
    plain = {PLAIN: fit_scales(energy, sums, math.inf)}
    if len(kept) == tokens.site.experts or mode == "none":
        return plain
    ladder = damp_ladder(damp)
    fitted = ([least_squares(a, c, each) for a, c in zip(*sums, strict=True)] for each in ladder)
    held_out = torch.stack([_held_out(energy, sums, by_fold) for by_fold in fitted], 1)
    best = ladder[least_held_out(held_out, ladder)]
    return plain | {name: fit_scales(energy, sums, best, power) for name, power in POWERS.items()}


def fit_scales(
    energy: Tensor, sums: tuple[Tensor, Tensor], damp: float, power: float = 0.0
) -> Scales:
    """Return scales by least squares, divided by a power of β, and what a row says of them."""
    whole = tuple(each.sum(0) for each in sums)
    parts = [*zip(*sums, energy, strict=True), (*whole, energy.sum())]
    *by_fold, both = (_stretched(least_squares(a, c, damp), c, n, power) for a, c, n in parts)
    facts = {
        "damp": damp,
        "error": ratio(energy.sum() + lost(*whole, both), energy.sum()),
        "holdout_error": ratio(_held_out(energy, sums, by_fold).sum(), energy.sum()),
        "condition": 1.0 if math.isinf(damp) else float(torch.linalg.cond(_damped(whole[0], damp))),
    }
    return Scales(tuple(by_fold), both, facts)


def _held_out(energy: Tensor, sums: tuple[Tensor, Tensor], by_fold: Sequence[Tensor]) -> Tensor:
    """Return the error of each fold's scales on the other fold, ``(2,)``."""
    others = zip(by_fold, *(reversed(each.unbind()) for each in (energy, *sums)), strict=True)
    return torch.stack([n + lost(a, c, scales) for scales, n, a, c in others])


def least_squares(a: Tensor, c: Tensor, damp: float) -> Tensor:
    """Return ``s = 1 + (A + Λ)⁻¹ (c − A 1)``, with Λ = λ · mean(diag A) · I."""
    one = torch.ones_like(c)
    if math.isinf(damp):
        return one
    return one + torch.linalg.lstsq(_damped(a, damp), (c - a @ one)[:, None]).solution[:, 0]


def lost(a: Tensor, c: Tensor, scales: Tensor) -> Tensor:
    """Return the error of scaled outputs, but for the energy of what they stand for."""
    return scales @ a @ scales - 2 * scales @ c


class Judge:
    """Sequences on their way past the blocks: of the dense model, and of it by each way.

    Scales are those of the fold that a sequence is not in.
    """

    def __init__(self, walk: Walk, batches: Sequence[Batch]) -> None:
        self.walk = walk
        self.texts = [list(of_fold(batches, fold)) for fold in range(FOLDS)]
        mine = slice(rank(), None, world_size())
        self.dense = [StreamedBatches("judged", walk, text[mine]) for text in self.texts]
        self.ways: dict[str, list[StreamedBatches]] = {}  # by fold; empty before the first experts

    def advance(self, index: int, chosen: Chosen | None = None) -> None:
        """Take all past a block, which is in memory, without the experts that leave it."""
        ways = {} if chosen is None else chosen.ways
        for name in ways or self.ways:
            own = self.ways.setdefault(name, [])
            for fold, dense in enumerate(self.dense):
                with ExitStack() as stack:
                    if ways:
                        scales = ways[name].by_fold[FOLDS - 1 - fold]
                        stack.enter_context(without_experts(self.walk.model, chosen, scales))
                    if fold == len(own):
                        own.append(dense.branch("judged", index))
                    else:
                        own[fold].advance(index)
        for dense in self.dense:
            dense.advance(index)

    def decide(self) -> tuple[str, dict[str, float]]:
        """Return the way of the least divergence of the whole model, and that of each per row."""
        model, total, rows = self.walk.model, dict.fromkeys(self.ways, 0.0), 0
        with self.walk.source.head():  # read once for all
            for fold, text in enumerate(self.texts):
                with self.dense[fold].answering():
                    dense = Divergence(model, text)
                for name, streams in self.ways.items():
                    with streams[fold].answering():
                        found = dense.of(model)
                    total[name] += found["divergence"] * found["rows"]
                rows += found["rows"]
                del dense  # before that of the next fold is there
        mean = {name: value / rows for name, value in total.items()}
        order = {name: value if math.isfinite(value) else math.inf for name, value in mean.items()}
        return min(order, key=order.get), mean


def of_fold(batches: Iterable[Batch], fold: int) -> Iterator[Batch]:
    """Yield the sequences of a fold that ways are judged on, evenly spread."""
    batches = list(batches)
    count = sum(int((batch.fold == fold).sum()) for batch in batches)
    seen, every = 0, max(1, count // JUDGED)
    for batch in batches:
        rows = (batch.fold == fold).nonzero().flatten()
        taken = rows[(torch.arange(len(rows)) + seen) % every == 0]
        seen += len(rows)
        if len(taken):
            yield batch.select(taken)


@contextmanager
def without_experts(model: nn.Module, layer: Chosen, scales: Tensor) -> Iterator[None]:
    """Run a model as it would be without the experts that leave a layer, the others scaled."""
    site, kept, given = layer.site, layer.kept, {}
    router, choice = router_of(model, site), choice_of(model, site)

    def send(_: nn.Module, arguments: tuple) -> tuple:
        hidden, _, old, *others = arguments
        weights, places = reroute(router, given["logits"], kept, site.wiring.experts, choice)
        weights = weights * scales.to(weights)[places]
        return hidden, kept[places], weights.to(old.dtype), *others

    watching = watched(router, lambda _, output: given.update(logits=output[0]))
    with watching, model.get_submodule(called_at(site)).register_forward_pre_hook(send):
        yield


def _stretched(scales: Tensor, c: Tensor, energy: Tensor, power: float) -> Tensor:
    """Return scales divided by ``β ** power``; as they are if nothing is along the output."""
    slope = float(scales @ c / energy) if energy > 0 else 1.0
    return scales / slope**power if slope > 0 else scales


def _damped(a: Tensor, damp: float) -> Tensor:
    mean = a.diagonal().mean()
    shift = damp * torch.where(mean > 0, mean, 1.0)
    return a + shift * torch.eye(len(a), dtype=a.dtype, device=a.device)
