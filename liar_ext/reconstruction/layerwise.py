"""Layerwise reconstruction: walk the blocks, and let each site compensate for those before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch, Batches, completed, one_of_each, read_batches
from liar_ext.models.plan import Plan, check_mode
from liar_ext.models.registry import family_of
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import sites
from liar_ext.models.whole import why_lent
from liar_ext.reconstruction.block_runner import is_chain
from liar_ext.reconstruction.ridge import check_settings
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.reconstruction.streams import (
    InMemory,
    SavedStreams,
    StreamedBatches,
    Streams,
    Walk,
    Weights,
    keep_block,
    kept_block,
)
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.errors import InputError
from liar_ext.system.progress import showing_bars

# A block that is solved and still as it was, new weights, and rows of its sites.
Solved = tuple[int, Weights, dict[str, SiteRow]]


@torch.no_grad()
def reconstruct_layerwise(
    model: nn.Module,
    batches: Batches,
    plan: Plan,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
    fresh: Batches = (),
    saved: Checkpoint | None = None,
    progress: bool = False,
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], list[SiteRow]]:
    """Solve the sites of ``plan`` block by block, each on what the pruned blocks before it give.

    With the stream ``h`` of the dense model and ``ĥ`` of the pruned one, and x and x̂ what the
    consumer ``y = W x + b`` of a site reads in them, the consumer is solved for::

        W x̂ + b + α (y* − W x̂ − b)     α in [0, 1] of least held-out error, with the target
        stream    y* = h_after − ĥ_before     make the stream equal the dense one after the site
        branch    y* = W x + b                where a norm or a scale comes before the stream

    Sites that lose nothing stay as they are.

    Parameters
    ----------
    model : nn.Module
        The dense model; it stays as it is.
    batches : iterable of mapping
        See :func:`liar_ext.calibrate`.
    plan : Plan
        What stays.
    mode : {"auto", "linear", "affine"}
        ``auto`` and ``affine``: affine for consumers that have a bias, or gain one by the plan.
    damp : float or "auto"
        λ, or the held-out choice.
    fresh : iterable of mapping
        Batches that no solve reads: each row has its error on them, as ``certified_error``,
        relative to their ``Σ |W x̂|²``.
    saved : Checkpoint, optional
        Where blocks that are done are kept, and read.
    progress : bool
        Show a progress bar.

    Returns
    -------
    weights : dict of str to (Tensor, Tensor or None)
        New consumer weight ``(d_out, n_kept)`` and bias ``(d_out,)`` by site name.
    rows : list of SiteRow
        One per site of the plan, in the plan's order.

    Raises
    ------
    InputError
        If an argument isn't one of the above, a fold gets no tokens, or the model lacks a site of
        the plan.

    Notes
    -----
    Memory: two streams of tokens × hidden, up to four more for the block at hand, and the sums of
    one layer. Source: docs/method.md, section "Layerwise reconstruction".
    """
    check_mode(mode)
    check_settings(mode, damp)
    batches = list(batches)
    check_walk(model, batches)
    walk = Walk(InMemory(model), plan.attn_unit, saved)
    weights, rows = {}, {}
    with showing_bars(progress):
        for _, new, solved in solve_layerwise(walk, plan, mode, damp, batches, fresh):
            weights |= new
            rows |= solved
    return weights, [rows[name] for name in plan.sites]


def solve_layerwise(
    walk: Walk,
    plan: Plan,
    mode: str,
    damp: float | str,
    batches: Batches,
    fresh: Batches,
    along: Sequence[StreamedBatches] | None = None,
    *,
    gone: Collection[int] = (),
) -> Iterator[Solved]:
    """Yield the blocks, each with its weights in memory and solved on those before it.

    Without ``along`` the walk ends with the last site of the plan. Blocks that are ``gone`` are
    left out.
    """
    every = [site for block in walk.blocks.layers for layer in block.values() for site in layer]
    plan.check_sites({site.name: site.units for site in every}, "layerwise")
    solver = LayerwiseSolver(walk, plan, mode, damp, gone)
    planned = max((walk.blocks.index_of(s) for s in every if s.name in plan.sites), default=-1)
    count = planned + 1 if along is None and not gone else len(walk.blocks)

    def steps(done: int, streams: Streams) -> Iterator[Solved]:
        solver.resume(streams)
        streams.clear()  # the first states, which the parts will have left behind
        title = "layerwise" if plan.sites else "save"
        for index in walk.through("gaps" if gone else title, done, count):
            if index <= planned:
                solver.step(index)
            yield index, *solver.take()

    if plan.sites:
        with walk.begun():
            solver.start(batches, fresh)
    key = "layerwise" if along is None else "pruning"
    numbers = [part.number for part in solver.parts]
    yield from solve_blocks(SavedStreams(walk, key, along or (), solver.streams, numbers), steps)


def solve_blocks(
    kept: SavedStreams, steps: Callable[[int, Streams], Iterator[Solved]]
) -> Iterator[Solved]:
    """Yield the blocks as ``steps`` solves them; those that the checkpoint has are read there.

    ``steps`` is given how many blocks are done, and all streams that are ``kept``, behind them.
    """
    walk, (done, found) = kept.walk, kept.restore()
    for index in range(done):
        with walk.source.block(index):
            yield index, *kept_block(walk.saved, index)
    for index, weights, rows in steps(done, found):
        keep_block(walk.saved, index, weights, rows)
        yield index, weights, rows
        weights.clear()  # the next block is solved without them
        for each in kept.texts:
            each.advance(index)
        kept.keep(index + 1)


def check_walk(model: nn.Module, batches: Sequence[Mapping[str, Tensor] | Tensor | Batch]) -> None:
    """Raise InputError unless the blocks of a model can be run one by one."""
    family = family_of(model)
    reason = family.without.get("layerwise") or why_lent(model) or None
    for batch in one_of_each(read_batches(batches)) if reason is None else []:
        one = completed(model, batch).to(device_of(model)).inputs
        with evaluating(model):
            if not is_chain(model, sites(model), one):
                reason = "a layer that is in no block reads what one writes"
    if reason is not None:
        raise InputError(
            f"layerwise: this {family.name!r} is reconstructed in one pass only, {reason}; use "
            'schedule="one-pass"'
        )


def check_block(walk: Walk, batches: Sequence[Batch], index: int) -> None:
    """Raise InputError if a block reads more of other blocks than what the one before wrote."""
    blocks = walk.blocks
    for one in one_of_each(batches):
        inputs = one.to(walk.source.device).inputs
        first, added = (blocks.enter(at, inputs)[0][0] for at in (0, index))
        # All blocks before answer -first, so that what is read must be that and what is added.
        with blocks.answering(dict.fromkeys(range(index), first.neg)):
            here = blocks.enter(index, inputs)[0][0]
        if not torch.equal(here, added - first.to(added)):
            raise InputError(
                "prune: --max-memory and --keep-experts are for blocks that read what the one "
                f"before wrote, and {type(walk.model).__name__} changes it before block {index}; "
                "leave them out"
            )
