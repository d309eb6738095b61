"""Prune a folder of weights into another one, with one block in memory at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from liar_ext.bars import Timeline
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.fingerprint import fixed_inputs
from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
from liar_ext.checkpoint.shards import Shards
from liar_ext.checkpoint_store import RESULT, Checkpoint
from liar_ext.data.batches import Batch, Batches, read_batch, read_batches
from liar_ext.distributed import alone, is_first
from liar_ext.evaluation import perplexity
from liar_ext.pipeline.analysis import Base, decide
from liar_ext.pipeline.choosing import Solved
from liar_ext.pipeline.estimate import bars_of, by_blocks, stages_of
from liar_ext.pipeline.job import Job, prepare, record
from liar_ext.pipeline.settings import describe_sizes, report_of
from liar_ext.pipeline.streamed import lines_of, share_out
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.layerwise import solve_layerwise
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.report.report import Report
from liar_ext.rows import SiteRow
from liar_ext.selection.divergence import Divergence
from liar_ext.streaming.block_store import BlockStore
from liar_ext.streaming.passes import StreamedPasses
from liar_ext.streaming.probes import ProbeStreams
from liar_ext.surgery.units import apply_plan


def prune_folder(
    store: BlockStore,
    batches: Batches,
    folder: str | os.PathLike[str],
    recipe: Recipe,
    *,
    max_memory: int,
    evaluate_on: Batches | None = None,
    certify_on: Batches | None = None,
    overwrite: bool = False,
    saved: Checkpoint | None = None,
    annotate: Callable[[Report], None] = lambda report: None,
    progress: bool = False,
) -> Report:
    """Prune a model that is read block by block, and write it to a folder as it is solved.

    The result is that of :func:`liar_ext.prune` and :func:`liar_ext.save_pruned`, but the model is
    never whole in memory, neither dense nor pruned.

    Parameters
    ----------
    store : BlockStore
        The dense model. Of several ranks each reads it and calls this alike; the first one
        evaluates, and writes the folder.
    batches : iterable of mapping
        The calibration set.
    folder : path
        Where the pruned model goes; hidden states that don't fit into memory lie beside it.
    recipe : Recipe
        Every choice; some can't be made here, see :func:`liar_ext.pipeline.streamed.check_blocks`.
    max_memory : int
        Bytes that the process may take, each of several.
    evaluate_on, certify_on : sequence of mapping, optional
        As for :func:`liar_ext.prune`.
    overwrite : bool
        As for :func:`liar_ext.save_pruned`.
    saved : Checkpoint, optional
        Where what is done is kept, and from where the job goes on; see ``checkpoint`` of
        :func:`liar_ext.prune`.
    annotate : callable
        Adds what else is known to the report before it is written.
    progress : bool
        Show progress bars.

    Raises
    ------
    InputError
        If a choice, the data or the budget can't be used, or the memory isn't enough for a block.
    """
    if is_first():
        check_folder(folder, overwrite)
    texts = {"evaluate_on": evaluate_on, "certify_on": certify_on}
    job = Job(store.model, list(read_batches(batches)), recipe, progress, saved=saved, **texts)
    walk = Walk.of(store, recipe.attn_unit, saved, progress)
    walk.states.folder = next(path for path in Path(folder).resolve().parents if path.is_dir())
    shown = ExitStack()
    try:
        job = _shared(prepare(replace(job, store=store)), max_memory)
        walk.states.memory = job.shares.states
        stages = stages_of(job) if progress else {}
        stages = by_blocks(stages, len(store), job.shares.keep_sums)
        shown.enter_context(Timeline("prune", bars_of(stages)).shown())
        passes, dense = _passes(job, walk)
        decision = decide(job, passes)
        base, (before, outputs) = Base(store.model, passes.at), _judged(job, passes, dense)
        del dense  # its hidden states are needed no more
        fixed, pruned = _fixed_input(walk), Along(walk, evaluate_on, certify_on)

        def done(shards: Shards | None) -> Report:
            plan, rows = _write(job, passes, decision.plan, [fixed, *pruned.texts], shards)
            with job.clock("evaluate"):
                evaluation = {"dense": before, "pruned": pruned.perplexity()}
                evaluation["certified"] = pruned.divergence(outputs)
            facts = {"max_memory": max_memory, "calibrate_passes": passes.taken}
            facts["hidden_states_on_disk"] = walk.states.most_on_disk
            solved = Solved(rows, job.recipe.schedule, passes.bank.source, facts=facts)
            return report_of(job, base, decision, solved, plan, evaluation)

        if not is_first():
            return done(None)
        with writing(folder, overwrite, checked=True) as path:
            shards = Shards(store.model, path, job.shares.shard)
            report = done(shards)
            annotate(report)
            if saved is not None:
                saved.put(RESULT, facts={"plan": report.plan.to_json()})
            with fixed.answering():
                fill_folder(
                    store.model,
                    path,
                    report.plan,
                    report=report,
                    tokenizer=store.tokenizer,
                    start=time.perf_counter(),
                    shards=shards,
                )
    finally:
        shown.close()
        walk.states.close()
        store.close()
    return report


def describe(
    store: BlockStore, batches: Batches, fresh: Batches | None, recipe: Recipe, limit: int
) -> list[str]:
    """Return lines on what a job would take in ``limit`` bytes, and check that it can be done."""
    job = Job(store.model, list(read_batches(batches)), recipe, certify_on=fresh, store=store)
    job = _shared(prepare(job), limit)
    return lines_of(store, job.batches, job.recipe, job.shares)


def _shared(job: Job, limit: int) -> Job:
    """Return a job with its memory shared out; sums that its checkpoint has are kept on."""
    given = job.store, job.sites(job.model), job.batches, job.recipe, limit
    shares = share_out(*given)
    if job.saved is not None:
        shares = share_out(*given, record(job, keep_sums=shares.keep_sums)["keep_sums"])
    return replace(job, shares=shares)


def _passes(job: Job, walk: Walk) -> tuple[StreamedPasses, Along]:
    """Return the first walk of a job, and the text that is judged along it."""
    along, probes = Along(walk, job.evaluate_on, job.certify_on), None
    if job.recipe.allocation == "curve":
        probes = ProbeStreams(walk, job.batches, job.recipe.budget, job.recipe.reconstruct)
    given = walk, job.batches, job.sites(walk.model), job.shares.keep_sums, along.texts, probes
    return StreamedPasses(*given), along


def _judged(
    job: Job, passes: StreamedPasses, along: Along
) -> tuple[dict[str, float] | None, Divergence | None]:
    """Return what the dense model gives for the text that has passed its blocks."""
    passes.restore_along()
    with job.clock("evaluate"):
        found = along.perplexity(), along.outputs()
    for each in along.texts:
        each.hidden.clear()
    return found


def _write(
    job: Job,
    passes: StreamedPasses,
    plan: Plan,
    texts: list[StreamedBatches],
    shards: Shards | None,
) -> tuple[Plan, list[SiteRow]]:
    """Solve, slice and write one block after the other; return the plan of the dense model."""
    recipe, rows, whole = job.recipe, {}, stock_config.from_dense(job.model, plan)
    given = plan, recipe.reconstruct, recipe.damp
    if recipe.schedule == "layerwise":
        fresh = job.certify_on or ()
        blocks = solve_layerwise(passes.walk, *given, job.batches, fresh, texts)
    else:
        blocks = passes.solve(*given, texts)
    for block in job.clock.each("reconstruct", blocks):
        rows |= block.rows
        with job.clock("surgery"):
            apply_plan(job.model, plan, block.weights, blocks=[block.index])
            if shards is not None:
                shards.add(job.store.tensors(block.index))
    if shards is not None:
        with job.clock("surgery"), job.store.head():
            shards.add(job.store.tensors())
    describe_sizes(job)
    job.model.liar_plan = whole
    return whole, [rows[name] for name in plan.sites]


class Along:
    """Text that walks along to be judged: perplexity on held-out, divergence on fresh text.

    Of several ranks the first one has it.

    Parameters
    ----------
    walk : Walk
        Over the blocks.
    held_out, fresh : iterable of mapping, optional
        As ``evaluate_on`` and ``certify_on`` of :func:`liar_ext.prune`.
    """

    def __init__(self, walk: Walk, held_out: Batches | None, fresh: Batches | None) -> None:
        here = is_first()
        judged = map(_as_judged, read_batches(held_out or ())) if here else ()
        self.walk, self.held_out = walk, StreamedBatches("held out", walk, judged)
        self.fresh = StreamedBatches("fresh", walk, read_batches(fresh or ()) if here else ())

    @property
    def texts(self) -> list[StreamedBatches]:
        """All of it."""
        return [self.held_out, self.fresh]

    def perplexity(self) -> dict[str, float] | None:
        """Return the perplexity of the model after its last block; None without text."""
        if not self.held_out.batches:
            return None
        with self.held_out.answering():
            text = self.held_out.batches
            return perplexity(self.walk.model, text, progress=self.walk.progress)

    def outputs(self) -> Divergence | None:
        """Return the dense model's outputs, to compare others with."""
        if not self.fresh.batches:
            return None
        with self.fresh.answering(), alone():
            return Divergence(self.walk.model, [batch.inputs for batch in self.fresh.batches])

    def divergence(self, dense: Divergence | None) -> dict[str, float] | None:
        """Return how far the model's outputs are from the dense ones."""
        if dense is None:
            return None
        with self.fresh.answering(), alone():
            return dense.of(self.walk.model)


def _fixed_input(walk: Walk) -> StreamedBatches:
    """Return the input that a written folder is verified by; the first rank has it."""
    dtype, inputs = walk.model.dtype, fixed_inputs(walk.model)
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    return StreamedBatches("fingerprint", walk, [read_batch(given)] if is_first() else [])


def _as_judged(batch: Batch) -> Batch:
    """Return a batch as the model gets it where its perplexity is measured."""
    ids: Tensor = batch.inputs["input_ids"]
    mask = ids.new_ones(ids.shape) if batch.mask is None else batch.mask.to(ids.dtype)
    return read_batch({"input_ids": ids, "attention_mask": mask})
