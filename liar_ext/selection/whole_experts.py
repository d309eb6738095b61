"""Whole experts: which of a layer stay, and what their outputs are multiplied by.

A layer gives ``y_t = Σ_e r_te f_e(h_t)``. With the experts K alone every token goes to top_k of K,
with weights r'. One number for each expert, folded into its consumer, makes up for the others::

    y'_t = Σ_{e∈K} s_e r'_te f_e(h_t)        W_e ← s_e W_e    b_e ← s_e b_e
    Σ_t |y_t − y'_t|² = n − 2 s·c + s·A s    A = Σ_t (r'_t r'_tᵀ) ∘ Φ_t    c = Σ_t r'_t ∘ (Φ_t r_t)

with ``Φ_t = F_t F_tᵀ`` the products of all experts' outputs on token t, so that any K is judged
exactly, re-routing included, without another run of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch, Batches, count_tokens, read_batches
from liar_ext.calibration.taps import watched
from liar_ext.models.plan import SitePlan
from liar_ext.models.registry import family_of
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites, teams_of
from liar_ext.models.whole import called_at, choice_of, gated, router_of, why_lent
from liar_ext.reconstruction.layerwise import check_block
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.selection.error_curves import CURVE_DAMP
from liar_ext.selection.expert_scales import (
    PLAIN,
    Chosen,
    Judge,
    LayerTokens,
    fit_ways,
    least_squares,
    lost,
)
from liar_ext.system.errors import InputError

MOST_TOKENS = 4096  # that experts are judged by, or up to twice as many: each has experts² products
CHUNK = 64  # tokens whose outputs of all experts are held at a time


def collect_tokens(
    model: nn.Module, first: Site, run: Callable[[Callable[[Batch], None]], None], stride: int = 1
) -> LayerTokens:
    """Return what a layer of experts does with every ``stride``-th token that passes it in ``run``.

    That is given a function to call with each batch before the model runs it.
    """
    experts = [each for each in sites(model, ("mlp",)) if each.team == first.team]
    router, choice = router_of(model, first), choice_of(model, first)
    module, seen = model.get_submodule(called_at(first)), 0
    now: dict[str, Tensor] = {}  # of the batch that is run
    parts: list[tuple[Tensor, ...]] = []

    def begin(batch: Batch) -> None:
        nonlocal seen
        width = next(iter(batch.inputs.values())).shape[1]
        counts = batch.counting(len(batch) * width, torch.device("cpu"))
        order = counts.cumsum(0) - 1 + seen
        now["used"] = (counts & (order % stride == 0)).nonzero().flatten()
        now["fold"] = batch.fold.repeat_interleave(width)
        seen += count_tokens(batch)

    def ran(arguments: tuple, _: object) -> None:
        hidden, chosen, weights = arguments[:3]
        used, fold = (now[name].to(hidden.device) for name in ("used", "fold"))
        whole = weights.new_zeros(len(hidden), first.experts, dtype=torch.float64)
        whole.scatter_(1, chosen, weights.double())
        products = _products(model, experts, hidden[used])
        parts.append((now["logits"][used], whole[used], products, fold[used]))

    with watched(router, lambda _, output: now.update(logits=output[0])), watched(module, ran):
        run(begin)
    joined = (torch.cat(part) for part in zip(*parts, strict=True))
    tokens = LayerTokens(first, router, choice, *joined)
    if set(tokens.fold.tolist()) != set(range(FOLDS)):
        raise InputError("experts: both folds need text; give at least 2 sequences")
    return tokens


def stride_of(tokens: int) -> int:
    """Return which of so many tokens judge experts."""
    return max(1, tokens // MOST_TOKENS)


def bytes_of_products(experts: int, tokens: int, hidden: int) -> int:
    """Return the bytes that the products of a layer's experts take at most while it is judged."""
    taken = -(-tokens // stride_of(tokens))
    joined, chunk = 2 * taken * experts**2, 2 * CHUNK * experts * hidden
    return 8 * (joined + chunk)


def _products(model: nn.Module, experts: Sequence[Site], hidden: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class KeptExperts:
    """Which experts stay: by layer, such as ``"3.mlp"``, what a plan and its slicing need."""

    plans: dict[str, SitePlan]  # for Plan.experts
    scales: dict[str, tuple[Tensor, None]]  # (kept,) float64, what their outputs are multiplied by
    rows: list[SiteRow]  # errors of the layers' outputs
    source: dict[str, int]  # sequences and tokens of the text
    # Of the whole model by each way to scale, on sequences that it wasn't fitted on; empty if no
    # other way was tried.
    divergences: dict[str, float]


@torch.no_grad()
def choose_experts(
    walk: Walk,
    batches: Batches,
    keep: float,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
    along: Sequence[StreamedBatches] = (),
) -> KeptExperts:
    """Choose the experts that stay, equally many in each layer; the model stays as it is.

    They leave one by one, each time the one without which the layer's output has the least error
    once the others are scaled, and tokens sent anew.

    ``keep`` is the fraction of the experts that stays. How the others are scaled, if at all, the
    whole model decides (:mod:`liar_ext.selection.expert_scales`); modes ``none`` and ``bias`` scale
    nothing. ``along`` is other text that passes the blocks of the dense model.
    """
    mode, model = "none" if mode == "bias" else mode, walk.model
    count = count_experts_kept(model, keep)
    losing = [site for site in layers_of(model) if site.experts > count]
    layers = {walk.blocks.index_of(site): site for site in losing}
    read = list(read_batches(batches))
    total = sum(map(count_tokens, read))
    text, judge = StreamedBatches("experts", walk, read), Judge(walk, read)
    found: list[Chosen] = []
    for index in walk.through("experts"):
        if index:
            check_block(walk, read, index)
        chosen = None
        if index in layers:
            run, stride = partial(text.advance, index), stride_of(total)
            tokens = collect_tokens(model, layers[index], run, stride)
            chosen = _chosen(tokens, count, mode, damp)
            del tokens  # its memory is for the next layer's
            found.append(chosen)
        else:
            text.advance(index)
        if not found or len(found[0].ways) > 1:
            judge.advance(index, chosen)
        for each in along:
            each.advance(index)
    way, divergences = judge.decide() if judge.ways else (PLAIN, {})
    plans, scales, rows = {}, {}, []
    for each in found:
        plans[each.site.team] = SitePlan(each.site.experts, tuple(each.kept.tolist()))
        scales[each.site.team] = each.ways[way].both, None
        rows.append(_row(model, each, way))
    source = {"sequences": sum(map(len, read)), "tokens": total}
    return KeptExperts(plans, scales, rows, source, divergences)


def _chosen(tokens: LayerTokens, count: int, mode: str, damp: float | str) -> Chosen:
    start, kept = time.perf_counter(), choose(tokens, count)
    ways = fit_ways(tokens, kept, mode, damp)
    return Chosen(tokens.site, kept, ways, time.perf_counter() - start)


def layers_of(model: nn.Module) -> list[Site]:
    """Return the first expert of every layer that has some."""
    at = [site for site in sites(model, ("mlp",)) if site.expert is not None]
    if not at:
        raise InputError(
            f"experts: {type(model).__name__} has no experts to remove; leave keep_experts out"
        )
    return [team[0] for team in teams_of(at).values()]


def count_experts_kept(model: nn.Module, keep: float | int) -> int:
    """Return how many experts stay in each layer: ``keep``, or at most that fraction of them."""
    site, family = layers_of(model)[0], family_of(model)
    router = router_of(model, site)
    reason = family.without.get("experts")
    if why := family.without.get("layerwise") or why_lent(model):
        reason = reason or f"they are chosen block by block, and {why}"
    if (groups := getattr(router, "num_group", None) or 1) > 1:
        reason = reason or f"the router chooses among {groups} groups of equally many experts"
    if reason:
        raise InputError(f"experts: {family.name} keeps all: {reason}; leave keep_experts out")
    count = int(keep) if keep > 1 else math.floor(keep * site.experts + 1e-9)
    if not router.top_k <= count < site.experts:
        raise InputError(
            f"experts: keep_experts {keep:.4g} leaves {count} of {site.experts} experts; it must "
            f"remove some, and leave the {router.top_k} that every token is sent to"
        )
    return count


def choose(tokens: LayerTokens, count: int) -> Tensor:
    """Return the experts of a layer that stay, ascending, the others gone one by one."""
    kept = torch.arange(tokens.site.experts, device=tokens.logits.device)
    while len(kept) > count:
        errors = []
        for place in range(len(kept)):
            a, c = (part.sum(0) for part in tokens.sums(_without(kept, place)))
            errors.append(lost(a, c, least_squares(a, c, CURVE_DAMP)))
        # Of equal ones the last expert goes.
        least = torch.stack(errors).flip(0).argmin()
        kept = _without(kept, len(kept) - 1 - int(least))
    return kept


def _without(kept: Tensor, place: int) -> Tensor:
    return torch.cat([kept[:place], kept[place + 1 :]])


def _row(model: nn.Module, chosen: Chosen, way: str) -> SiteRow:
    site = chosen.site
    router = router_of(model, site)
    module = model.get_submodule(site.consumer.rpartition(".")[0])
    both = [*module.parameters(recurse=False), *router.parameters()]
    each = sum(parameter.numel() for parameter in both) // site.experts
    return SiteRow(
        name=f"{site.team.rpartition('.')[0]}.experts",
        units_before=site.experts,
        units_after=len(chosen.kept),
        params_before=each * site.experts,
        params_after=each * len(chosen.kept),
        dropped_rows=0,
        seconds=chosen.seconds,
        path=way,
        **chosen.ways[way].facts,
    )
