"""Prune a folder of weights into another one, with one block in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from liar_ext.calibration.batches import read_batch, read_batches
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.fingerprint import fixed_inputs
from liar_ext.checkpoint.saving import Shards, check_folder, fill_folder, writing
from liar_ext.checkpoint_store import RESULT
from liar_ext.distributed import alone, is_first
from liar_ext.job.analysis import Base, Decision
from liar_ext.job.choosing import Solved
from liar_ext.job.preparing import Job, judged_texts, outputs_of, perplexity_of
from liar_ext.job.pruning import describe_sizes, run
from liar_ext.job.streamed_passes import StreamedPasses
from liar_ext.models.slicing import apply_plan
from liar_ext.plan import Plan
from liar_ext.reconstruction.layerwise import solve_layerwise
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.report.report import Report


def prune_folder(
    store: BlockStore,
    job: Job,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    annotate: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Prune a model that is read block by block, and write it to a folder as it is solved.

    The result is that of :func:`liar_ext.prune` and :func:`liar_ext.save_pruned`, but the model is
    never whole in memory, neither dense nor pruned.

    Of several ranks each calls this alike; the first one evaluates, and writes the folder.

    Parameters
    ----------
    store : BlockStore
        The dense model.
    job : Job
        Of its model, within ``limit`` bytes for each process. Some choices can't be made here, see
        :func:`liar_ext.job.streamed.check_blocks`.
    folder : path
        Where the pruned model goes; hidden states that don't fit into memory lie beside it.
    annotate : callable
        Adds what else is known to the report before it is written.

    Raises
    ------
    InputError
        If a choice, the data or the budget can't be used, or the memory isn't enough for a block.
    """
    if is_first():
        check_folder(folder, overwrite)
    walk = Walk(store, job.recipe.attn_unit, job.saved, job.progress)
    walk.states.folder = next(path for path in Path(folder).resolve().parents if path.is_dir())
    with ExitStack() as stack:
        stack.callback(store.close)
        stack.callback(walk.states.close)
        fixed, out = _fixed_input(walk), []

        def finish(job: Job, _: Base, passes: StreamedPasses, decision: Decision) -> Solved:
            if is_first():
                path = stack.enter_context(writing(folder, overwrite, checked=True))
                out[:] = path, Shards(store.model, path, job.shares.shard)
            return _write(job, passes, decision.plan, fixed, *out[1:])

        batches = list(read_batches(job.batches))
        report = run(replace(job, batches=batches, walk=walk), finish)
        if not out:
            return report
        annotate(report)
        if job.saved is not None:
            job.saved.put(RESULT, facts={"plan": report.plan.to_json()})
        with fixed.answering():
            fill_folder(
                store.model,
                out[0],
                report.plan,
                report=report,
                tokenizer=store.tokenizer,
                shards=out[1],
            )
    return report


def _write(
    job: Job,
    passes: StreamedPasses,
    plan: Plan,
    fixed: StreamedBatches,
    shards: Shards | None = None,
) -> Solved:
    """Solve, slice and write one block after the other; judge the dense and the pruned model."""
    recipe, walk, rows = job.recipe, job.walk, {}
    passes.restore_along()
    with job.clock("evaluate"):
        held_out, fresh = passes.along
        dense, outputs = perplexity_of(held_out), outputs_of(fresh)
    held_out.hidden.clear()  # needed no more
    fresh.hidden.clear()
    held_out, fresh = texts = judged_texts(walk, job.evaluate_on, job.certify_on)
    whole = stock_config.from_dense(job.model, plan)
    given, along = (plan, recipe.reconstruct, recipe.damp), [fixed, *texts]
    if recipe.schedule == "layerwise":
        blocks = solve_layerwise(walk, *given, job.batches, job.certify_on or (), along)
    else:
        blocks = passes.solve(*given, along)
    for index, weights, solved in job.clock.each("reconstruct", blocks):
        rows |= solved
        with job.clock("surgery"):
            apply_plan(job.model, plan, weights, blocks=[index])
            if shards is not None:
                shards.add(walk.source.tensors(index))
    if shards is not None:
        with job.clock("surgery"), walk.source.head():
            shards.add(walk.source.tensors())
    describe_sizes(job)
    job.model.liar_plan = whole
    with job.clock("evaluate"):
        pruned, certified = perplexity_of(held_out), None
    if outputs is not None:
        with job.clock("certify"), fresh.answering(), alone():
            certified = outputs.of(job.model)
    return Solved(
        [rows[name] for name in plan.sites],
        recipe.schedule,
        passes.bank.source,
        facts={
            "max_memory": job.limit,
            "calibrate_passes": passes.taken,
            "hidden_states_on_disk": walk.states.most_on_disk,
        },
        plan=whole,
        dense=dense,
        pruned=pruned,
        certified=certified,
    )


def _fixed_input(walk: Walk) -> StreamedBatches:
    """Return the input that a written folder is verified by; the first rank has it."""
    dtype, inputs = walk.model.dtype, fixed_inputs(walk.model)
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    return StreamedBatches("fingerprint", walk, [read_batch(given)] if is_first() else [])
