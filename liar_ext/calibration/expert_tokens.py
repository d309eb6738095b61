"""What a layer of experts does with tokens: as much of it as judges any set of experts exactly."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch
from liar_ext.calibration.taps import Ended, watched
from liar_ext.errors import InputError
from liar_ext.models.experts import called_at, choice_of, gated, reroute, router_of
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites

CHUNK = 64  # tokens whose outputs of all experts are held at a time


@dataclass(frozen=True)
class LayerTokens:
    """What a layer of experts does with tokens, as much of it as judges any set of experts.

    Parameters
    ----------
    site : Site
        The first expert.
    router : nn.Module
        What sends tokens to experts.
    choice : tuple of Tensor
        What it is called with beside the tokens.
    logits : Tensor
        ``(tokens, experts)``: the router's.
    routed : Tensor
        ``(tokens, experts)`` float64: weights r of the dense layer.
    products : Tensor
        ``(tokens, experts, experts)`` float64: Φ.
    fold : Tensor
        ``(tokens,)`` int64.
    """

    site: Site
    router: nn.Module
    choice: tuple[Tensor, ...]
    logits: Tensor
    routed: Tensor
    products: Tensor
    fold: Tensor

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


@torch.no_grad()
def collect_tokens(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[Site], stride: int = 1
) -> list[LayerTokens]:
    """Return what some layers do with every ``stride``-th token that isn't padding."""
    found: dict[str, list[tuple[Tensor, ...]]] = {site.team: [] for site in layers}
    experts = {
        site.team: [other for other in sites(model, ("mlp",)) if other.team == site.team]
        for site in layers
    }
    logits: dict[str, Tensor] = {}
    now: dict[str, Tensor] = {}

    def routed(name: str):
        return lambda _, output: logits.update({name: output[0]})

    def reached(site: Site):
        def note(args: tuple, _: object) -> None:
            hidden, chosen, weights = args[:3]
            used = now["used"].to(hidden.device)
            whole = weights.new_zeros(len(hidden), site.experts, dtype=torch.float64)
            whole.scatter_(1, chosen, weights.double())
            found[site.team].append(
                (
                    logits.pop(site.team)[used],
                    whole[used],
                    _products(model, experts[site.team], hidden[used]),
                    now["fold"].to(hidden.device)[used],
                )
            )
            if site is layers[-1]:
                raise Ended

        return note

    device, seen = device_of(model), 0
    body = getattr(model, "base_model", model)
    with ExitStack() as stack:
        for site in layers:
            module = model.get_submodule(called_at(site))
            stack.enter_context(watched(router_of(model, site), routed(site.team)))
            stack.enter_context(watched(module, reached(site)))
        stack.enter_context(evaluating(model))
        for batch in batches:
            each = next(iter(batch.inputs.values())).shape[1]
            counts = batch.counting(len(batch) * each, torch.device("cpu"))
            order = counts.cumsum(0) - 1 + seen
            now["used"] = (counts & (order % stride == 0)).nonzero().flatten()
            now["fold"] = batch.fold.repeat_interleave(each)
            seen += int(counts.sum())
            with suppress(Ended):
                body(**batch.to(device).inputs)
    layers_found = []
    for site in layers:
        parts = [torch.cat(part) for part in zip(*found.pop(site.team), strict=True)]
        tokens = LayerTokens(site, router_of(model, site), choice_of(model, site), *parts)
        if set(tokens.fold.tolist()) != set(range(FOLDS)):
            raise InputError(
                f"experts: each of the {FOLDS} folds needs tokens; give at least 2 sequences"
            )
        layers_found.append(tokens)
    return layers_found


def _products(model: nn.Module, experts: Sequence[Site], hidden: Tensor) -> Tensor:
    """Return the products of all experts' outputs on each token, Φ."""
    parts = []
    for chunk in hidden.split(CHUNK):
        given = []
        for site in experts:
            out = gated(model, site, chunk) @ get_consumer_weight(model, site).T
            bias = get_consumer_bias(model, site)
            given.append((out if bias is None else out + bias).double())
        outputs = torch.stack(given, dim=1)
        parts.append(torch.bmm(outputs, outputs.mT))
    size = len(experts)
    return torch.cat(parts) if parts else hidden.new_zeros(0, size, size, dtype=torch.float64)


def count_tokens(batch: Batch) -> int:
    """Return the tokens of a batch that aren't padding."""
    shape = next(iter(batch.inputs.values())).shape
    return shape[0] * shape[1] if batch.mask is None else int(batch.mask.sum())
