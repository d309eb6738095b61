"""Whole blocks: which stay, and the layers around the gaps solved for what the others gave.

Blocks go one by one, always the one without which the model's output diverges least from the dense
one's. Then the consumers from before the first gap on are solved block by block. With ĥ the stream
of the shorter model, x̂ what a consumer W reads in it, and h the dense model's stream::

    min_W' Σ_t |h_after − ĥ_before − W' x̂_t|²        h_after: after the site, and
                                                     before a gap: after the last block of the gap
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batches, count_tokens, read_batches
from liar_ext.calibration.collect import check_finite_weights
from liar_ext.calibration.divergence import Divergence
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.registry import type_of
from liar_ext.models.sites import attn_unit_of, sites
from liar_ext.models.slicing import DENSE
from liar_ext.models.whole import attending_blocks, count_blocks_kept, stack_of
from liar_ext.reconstruction.layerwise import check_walk, solve_layerwise
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.reconstruction.streams import InMemory, StreamedBatches, Walk
from liar_ext.selection.error_curves import probes_of
from liar_ext.selection.sensitivity import POSITIONS
from liar_ext.system.distributed import rank, world_size
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar

SAME = 1e-4  # how far a divergence may be from that of the same model, run in another way


@dataclass(frozen=True)
class KeptBlocks:
    """What :func:`choose_blocks` decided and solved."""

    plan: SitePlan
    # New consumer weights and biases, all input features, by "dense." and the name of the site.
    weights: dict[str, tuple[Tensor, Tensor | None]]
    rows: list[SiteRow]  # one
    source: dict[str, int]  # sequences, tokens
    divergences: dict[int, float]  # once a block is gone, by block in the order in which they went
    judge: Divergence  # from the dense model, on a few sequences

    def check(self, fewer: nn.Module) -> None:
        """Raise InputError unless a copy without the blocks, not solved, is the one judged here."""
        *_, expected = self.divergences.values()
        found = self.judge.of(fewer, finite_only=True)["divergence"]
        if not math.isclose(found, expected, rel_tol=SAME, abs_tol=1e-6):
            raise InputError(
                f"blocks: blocks of {type(fewer).__name__} give something else in another place: "
                f"the output diverges by {found:.4g}, not {expected:.4g}; leave keep_blocks out"
            )


@torch.no_grad()
def choose_blocks(
    model: nn.Module,
    batches: Batches,
    keep: float,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
) -> KeptBlocks:
    """Choose the blocks that stay and solve the layers around the gaps; the model isn't changed.

    ``keep``, below 1, is the fraction of the blocks that may stay; the first one always does. With
    ``mode`` ``none`` or ``bias`` nothing is solved.
    """
    start, (_, blocks) = time.perf_counter(), stack_of(model)
    count, batches = count_blocks_kept(model, keep), list(read_batches(batches))
    check_finite_weights(model)
    check_walk(model, batches)
    probes = list(read_batches(probes_of(model, batches)))
    judge, walk = Divergence(model, probes, POSITIONS), Walk(InMemory(model))
    own = StreamedBatches("probes", walk, probes[rank() :: world_size()])
    with walk.begun():
        divergences = _choose(judge, own, len(blocks) - count)
    gone, weights, around = set(divergences), {}, []
    if mode not in ("none", "bias"):
        weights, around = _refit(model, batches, gone, mode, damp)
    kept = tuple(index for index in range(len(blocks)) if index not in gone)
    source = {"sequences": sum(map(len, batches)), "tokens": sum(map(count_tokens, batches))}
    row = _row(blocks, gone, around, time.perf_counter() - start)
    plan = SitePlan(len(blocks), kept)
    return KeptBlocks(plan, weights, [row], source, divergences, judge)


def _choose(judge: Divergence, text: StreamedBatches, remove: int) -> dict[int, float]:
    """Return the blocks that go, in order, with the divergence from the dense model after each.

    Without one block more a model seldom diverges less. So a block whose last divergence is more
    than the least one now is not tried again.
    """
    left, gone = list(range(len(text.walk.blocks))), {}
    known, attending = dict.fromkeys(left[1:], 0.0), attending_blocks(text.walk.model)
    for _ in Bar(range(remove), desc="blocks"):
        before = [text]  # each block that is left
        for block in left[:-1]:
            before.append(before[-1].branch("probes", block))
        least, best = math.inf, -1
        for block in sorted(known, key=known.__getitem__):
            if known[block] >= least:
                break
            if attending.intersection(left) == {block}:
                continue
            place = left.index(block)
            passed = before[place]
            for later in left[place + 1 :]:
                passed = passed.branch("probes", later)
            with passed.answering():
                found = judge.of(text.walk.model, finite_only=True)["divergence"]
            known[block] = found if math.isfinite(found) else math.inf
            if known[block] < least:
                least, best = known[block], block
        if best < 0:
            raise InputError(
                "blocks: without any one block the outputs are not finite; load the model in a "
                "wider dtype"
            )
        gone[best] = least
        left.remove(best)
        del known[best]
    return gone


def _refit(
    model: nn.Module, batches: Batches, gone: set[int], mode: str, damp: float | str
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], list[SiteRow]]:
    """Return new weights of consumers, and the rows of those before a gap."""
    at, first = sites(model), min(gone) - 1
    unit = attn_unit_of(at)
    solved = [site for site in at if site.block >= first and site.block not in gone]
    whole = {site.name: SitePlan.first(site.units, site.units) for site in solved}
    plan = Plan(type_of(model), unit, whole)
    walk = Walk(InMemory(model), unit)
    weights, rows = {}, {}
    for _, new, found in solve_layerwise(walk, plan, mode, damp, batches, (), gone=gone):
        weights |= {f"{DENSE}{name}": each for name, each in new.items()}
        rows |= found
    ends = {site.block: site.name for site in solved if site.block + 1 in gone}
    return weights, [rows[name] for name in ends.values()]


def _row(
    blocks: Sequence[tuple[str, nn.Module]], gone: set[int], rows: Sequence[SiteRow], seconds: float
) -> SiteRow:
    """Return the row of all blocks: errors are means over the consumers before the gaps."""
    sizes = [sum(each.numel() for each in block.parameters()) for _, block in blocks]

    def mean(name: str) -> float:
        return sum(getattr(row, name) for row in rows) / len(rows) if rows else 1.0

    return SiteRow(
        name="blocks",
        units_before=len(blocks),
        units_after=len(blocks) - len(gone),
        params_before=sum(sizes),
        params_after=sum(size for index, size in enumerate(sizes) if index not in gone),
        damp=max((row.damp for row in rows), default=math.inf),
        error=mean("error"),
        holdout_error=mean("holdout_error"),
        condition=max((row.condition for row in rows), default=1.0),
        dropped_rows=max((row.dropped_rows for row in rows), default=0),
        path=f"without {', '.join(map(str, sorted(gone)))}",
        seconds=seconds,
        target="stream",
        share=mean("share") if rows else 0.0,
    )
