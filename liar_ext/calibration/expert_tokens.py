"""What a layer of experts does with tokens: as much of it as judges any set of experts exactly."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch, count_tokens
from liar_ext.calibration.taps import Ended, watched
from liar_ext.errors import InputError
from liar_ext.models.experts import called_at, choice_of, gated, reroute, router_of
from liar_ext.models.running import body_of, device_of, evaluating
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites

CHUNK = 64  # tokens whose outputs of all experts are held at a time


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


class _Collector:
    """Collects what one layer does with the tokens of a batch, at two hooks."""

    def __init__(self, model: nn.Module, first: Site, last: bool) -> None:
        self.model, self.first, self.last = model, first, last
        mlps = sites(model, ("mlp",))
        self.experts = [each for each in mlps if each.team == first.team]
        self.parts: list[tuple[Tensor, ...]] = []
        self.used = self.fold = self.logits = torch.empty(0)  # of the batch that is run

    def chose(self, _: tuple, output: tuple) -> None:
        """Note the logits of the router."""
        self.logits = output[0]

    def ran(self, arguments: tuple, _: object) -> None:
        """Note what the experts got and gave; end the pass behind the last layer."""
        hidden, chosen, weights = arguments[:3]
        used, fold = self.used.to(hidden.device), self.fold.to(hidden.device)
        whole = weights.new_zeros(len(hidden), self.first.experts, dtype=torch.float64)
        whole.scatter_(1, chosen, weights.double())
        products = _products(self.model, self.experts, hidden[used])
        self.parts.append((self.logits[used], whole[used], products, fold[used]))
        if self.last:
            raise Ended

    def tokens(self) -> LayerTokens:
        """Return what was collected of all batches, whose memory is free afterwards."""
        parts, self.parts = self.parts, []
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        router, choice = router_of(self.model, self.first), choice_of(self.model, self.first)
        tokens = LayerTokens(self.first, router, choice, *joined)
        if set(tokens.fold.tolist()) != set(range(FOLDS)):
            raise InputError(
                f"experts: each of the {FOLDS} folds needs tokens; give at least 2 sequences"
            )
        return tokens


@torch.no_grad()
def collect_tokens(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[Site], stride: int = 1
) -> list[LayerTokens]:
    """Return what some layers do with every ``stride``-th token that isn't padding."""
    collectors = [_Collector(model, site, site is layers[-1]) for site in layers]
    device, seen = device_of(model), 0
    with ExitStack() as stack:
        for each in collectors:
            module = model.get_submodule(called_at(each.first))
            stack.enter_context(watched(router_of(model, each.first), each.chose))
            stack.enter_context(watched(module, each.ran))
        stack.enter_context(evaluating(model))
        for batch in batches:
            width = next(iter(batch.inputs.values())).shape[1]
            counts = batch.counting(len(batch) * width, torch.device("cpu"))
            order = counts.cumsum(0) - 1 + seen
            for each in collectors:
                each.used = (counts & (order % stride == 0)).nonzero().flatten()
                each.fold = batch.fold.repeat_interleave(width)
            seen += count_tokens(batch)
            with suppress(Ended):
                body_of(model)(**batch.to(device).inputs)
    return [each.tokens() for each in collectors]


def _products(model: nn.Module, experts: Sequence[Site], hidden: Tensor) -> Tensor:
    """Return the products of all experts' outputs on each token, Φ."""
    size = len(experts)
    parts = [hidden.new_zeros(0, size, size, dtype=torch.float64)]
    for chunk in hidden.split(CHUNK) if len(hidden) else ():
        given = []
        for site in experts:
            out = gated(model, site, chunk) @ get_consumer_weight(model, site).T
            bias = get_consumer_bias(model, site)
            given.append((out if bias is None else out + bias).double())
        outputs = torch.stack(given, dim=1)
        parts.append(torch.bmm(outputs, outputs.mT))
    return torch.cat(parts)
