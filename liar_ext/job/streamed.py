"""What a job does otherwise with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from liar_ext.calibration.batches import Batch
from liar_ext.calibration.saved_sums import bytes_of_sums
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.saving import SHARD_BYTES
from liar_ext.distributed import gather
from liar_ext.errors import InputError
from liar_ext.job.estimate import (
    GIB,
    bytes_by_blocks,
    bytes_of_states,
    in_gib,
    room_for_states,
    tokens_of,
)
from liar_ext.models.registry import family_of
from liar_ext.models.sites import Site, sites
from liar_ext.recipe import Recipe

SHARD_PART = 8  # a shard may take this part of the memory


def check_blocks(model: nn.Module, recipe: Recipe, blocks: int, *, certifies: bool) -> None:
    """Raise InputError for what can't be done with one of so many blocks at a time.

    Whether something comes between the blocks is seen on the way.
    """
    refused = [recipe.spelled(each) for each in recipe.without("streamed")]
    if certifies and recipe.schedule == "one-pass":
        refused.append("--certify with --schedule one-pass")
    if refused:
        raise InputError(
            f"prune: {refused[0]} needs the whole model in memory, and --max-memory says that "
            "it isn't; leave one of them out"
        )
    family, at = family_of(model), sites(model)
    reason = family.without.get("layerwise")
    if family.parts:
        reason = reason or "it has several stacks of blocks"
    if {site.block for site in at} != set(range(blocks)):
        reason = reason or "some of its blocks have no site"
    if any(site.expert is not None for site in at):
        reason = reason or "tokens are routed to its experts"
    if reason is not None:
        raise InputError(
            f"prune: --max-memory can't read this {family.name!r} block by block: {reason}; "
            "leave it out"
        )


@dataclass(frozen=True)
class Shares:
    """What the memory of a job is for, in bytes."""

    need: dict[str, int]  # the peak without hidden states, by its parts
    shard: int  # of what is written at a time
    states: int  # hidden states in memory; what is more lies in a file
    keep_sums: bool  # whether the sums of all blocks are held


def share_out(
    store: BlockStore,
    at: Sequence[Site],
    batches: Sequence[Batch],
    recipe: Recipe,
    limit: int,
    keep_sums: bool | None = None,
) -> Shares:
    """Share ``limit`` bytes out; raise InputError if a block and its sums don't fit.

    Sums are kept where they fit, unless ``keep_sums`` says.
    """

    def needed(shard: int) -> dict[str, int]:
        size = store.block_bytes * (1 + store.prefetch)
        need = bytes_by_blocks(store.model, at, batches, recipe, blocks=size, head=store.head_bytes)
        return need | {"a shard to be written": shard}

    shard = min(SHARD_BYTES, max(limit // SHARD_PART, store.block_bytes))
    need = needed(shard)
    if sum(need.values()) > limit:
        store.prefetch = False  # slower, but memory for one block less
        shard = store.block_bytes
        need = needed(shard)
    left, sums = room_for_states(need, limit), sum(bytes_of_sums(site.d_in) for site in at)
    if keep_sums is None:
        keep_sums = all(gather(recipe.schedule == "one-pass" and sums <= left // 2))
    return Shares(need, shard, max(0, left - (sums if keep_sums else 0)), keep_sums)


def describe_streamed(job: Any) -> list[str]:
    """Return lines on what a prepared :class:`~liar_ext.job.preparing.Job` would take."""
    store, shares, layerwise = job.walk.source, job.shares, job.recipe.schedule == "layerwise"
    tokens = sum(map(tokens_of, job.batches))
    held = bytes_of_states(job.model, sites(job.model), tokens, layerwise=layerwise)
    beyond, need = max(0, held - shares.states), sum(shares.need.values())
    again = "" if shares.keep_sums or layerwise else ", twice"
    return [
        f"{type(job.model).__name__}: {job.params['before']:,} parameters, "
        f"{store.total_bytes / GIB:.3g} GiB in {len(store)} blocks of at most "
        f"{store.block_bytes / GIB:.3g} GiB, read {'with' if store.prefetch else 'without'} "
        "reading ahead",
        f"memory: {need / GIB:.3g} of {job.limit / GIB:.3g} GiB without hidden states "
        f"(GiB: {in_gib(shares.need)})",
        f"hidden states: {held / GIB:.3g} GiB, of which {beyond / GIB:.3g} GiB lie "
        "in the output folder",
        f"weights: read twice and written once; calibration text summed{again}",
    ]
