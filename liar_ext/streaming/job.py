"""Prune a folder of weights into another one, with one block in memory at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from liar_ext.bars import Timeline
from liar_ext.calibration.memory import bytes_of_sums
from liar_ext.calibration.saved_sums import SUMS
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.fingerprint import count_params, fixed_inputs
from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
from liar_ext.checkpoint.shards import SHARD_BYTES, Shards
from liar_ext.checkpoint_store import RESULT, Checkpoint
from liar_ext.data.batches import Batches, read_batches
from liar_ext.data.hidden_states import HiddenStates
from liar_ext.distributed import gather, is_first, share
from liar_ext.errors import InputError
from liar_ext.models.registry import family_of
from liar_ext.models.sites import Site, sites
from liar_ext.pipeline.estimate import (
    GIB,
    bars_of,
    by_blocks,
    bytes_by_blocks,
    bytes_of_states,
    in_gib,
    room_for_states,
    tokens_of,
)
from liar_ext.pipeline.job import Job
from liar_ext.pipeline.pipeline import begin, decide, expected
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.saved_walk import SavedStreams
from liar_ext.report.report import Report
from liar_ext.selection.criteria import score
from liar_ext.selection.divergence import Divergence
from liar_ext.selection.error_curves import notes_of
from liar_ext.streaming.block_store import BlockStore
from liar_ext.streaming.first_walk import FirstWalk
from liar_ext.streaming.judging import Judged
from liar_ext.streaming.passes import StreamedPasses
from liar_ext.streaming.probes import ProbeStreams
from liar_ext.streaming.second_walk import SecondWalk
from liar_ext.streaming.trace import Trace

SHARD_PART = 8  # a shard may take this part of the memory
DENSE = "judged"  # the streams that the dense model is judged on


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
        Every choice; some can't be made here, see :meth:`StreamedJob.check`.
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
    given = store.model, list(read_batches(batches)), recipe, progress
    job = StreamedJob(*given, store=store)
    job.evaluate_on, job.certify_on, job.saved = evaluate_on, certify_on, saved
    job.states.folder = next(path for path in Path(folder).resolve().parents if path.is_dir())
    shown = ExitStack()
    try:
        job.check()
        job.make_room(max_memory)
        job.begin(max_memory)
        stages = by_blocks(expected(job), len(store), job.keep_sums)
        shown.enter_context(Timeline("prune", bars_of(stages)).shown())
        passes = job.calibrate(store.model)
        plan = decide(job, passes)
        job.judge(passes)
        if not is_first():
            plan = job.write(passes, plan, None)
            return job.report(plan, None, None)
        with writing(folder, overwrite, checked=True) as path:
            shards = Shards(store.model, path, job.shard_bytes)
            plan = job.write(passes, plan, shards)
            report = job.report(plan, *job.perplexities)
            annotate(report)
            if saved is not None:
                saved.put(RESULT, facts={"plan": plan.to_json()})
            with job.fingerprint.answering(job.blocks):
                fill_folder(
                    store.model,
                    path,
                    plan,
                    report=report,
                    tokenizer=store.tokenizer,
                    start=time.perf_counter(),
                    shards=shards,
                )
    finally:
        shown.close()
        job.states.close()
        store.close()
    return report


@dataclass
class StreamedJob(Job):
    """A job whose steps read one block at a time."""

    store: BlockStore | None = None
    states: HiddenStates = field(default_factory=HiddenStates)
    shard_bytes: int = SHARD_BYTES
    keep_sums: bool | None = None
    need: dict[str, int] = field(default_factory=dict)
    blocks: Blocks | None = None
    evaluate_on: Batches | None = None
    certify_on: Batches | None = None
    dense: Judged | None = None  # past all blocks
    dense_outputs: Divergence | None = None  # on fresh text
    perplexities: list[dict[str, float] | None] = field(default_factory=lambda: [None, None])
    fingerprint: Trace | None = None  # the input that the folder is verified by

    def check(self) -> None:
        """Raise InputError for what can't work at all, or not with one block at a time."""
        refused = [self.recipe.spelled(each) for each in self.recipe.without("streamed")]
        if self.certify_on is not None and self.recipe.schedule == "one-pass":
            refused.append("--certify with --schedule one-pass")
        if refused:
            raise InputError(
                f"prune: {refused[0]} needs the whole model in memory, and --max-memory says that "
                "it isn't; leave one of them out"
            )
        self._check_walk()
        super().check()

    @property
    def measures(self) -> bool:
        """Never: the model that is solved is written, and not there to be compared."""
        return False

    def _choose_schedule(self, at: Sequence[Site]) -> None:
        """Walk where fresh text is given: in one pass it can't be measured on block by block."""
        if self.certify_on is None:
            super()._choose_schedule(at)

    def _check_walk(self) -> None:
        """Refuse a model of which more than one block has to be in memory.

        Whether something comes between the blocks is seen on the way.
        """
        family = family_of(self.model)
        reason = family.without.get("layerwise")
        if family.parts:
            reason = reason or "it has several stacks of blocks"
        at = sites(self.model)
        if {site.block for site in at} != set(range(len(self.store))):
            reason = reason or "some of its blocks have no site"
        if any(site.expert is not None for site in at):
            reason = reason or "tokens are routed to its experts"
        if reason is not None:
            raise InputError(
                f"prune: --max-memory can't read this {family.name!r} block by block: {reason}; "
                "leave it out"
            )

    def before_plan(self) -> dict[str, int | None]:
        """Return the steps of the first walk, a block each."""
        return {"calibrate": len(self.store)}

    def make_room(self, limit: int) -> None:
        """Share ``limit`` bytes out; raise InputError if a block and its sums don't fit."""
        at, store = self.sites(self.model), self.store
        self.shard_bytes = min(SHARD_BYTES, max(limit // SHARD_PART, store.block_bytes))
        self._count_need(at)
        if sum(self.need.values()) > limit:
            store.prefetch = False  # slower, but memory for one block less
            self.shard_bytes = store.block_bytes
            self._count_need(at)
        left = room_for_states(self.need, limit)
        sums = sum(bytes_of_sums(site.d_in) for site in at)
        if self.keep_sums is None:
            fits = self.recipe.schedule == "one-pass" and sums <= left // 2
            self.keep_sums = all(gather(fits))
        self.states.memory = max(0, left - (sums if self.keep_sums else 0))
        self.facts["max_memory"] = limit

    def _count_need(self, at: Sequence[Site]) -> None:
        store = self.store
        size, given = store.block_bytes * (1 + store.prefetch), (self.batches, self.recipe)
        self.need = bytes_by_blocks(self.model, at, *given, blocks=size, head=store.head_bytes)
        self.need["a shard to be written"] = self.shard_bytes

    def begin(self, limit: int) -> None:
        """Note in its checkpoint which job this is; sums that were kept there are kept on."""
        if self.saved is not None:
            texts = {"held-out text": self.evaluate_on, "fresh text": self.certify_on}
            known = begin(self, texts, keep_sums=self.keep_sums)
            self.keep_sums = known["keep_sums"]
            self.make_room(limit)

    def weights_digest(self) -> str:
        """Return what tells the model's weights from others."""
        return self.store.fingerprint()

    def calibrate(self, model: torch.nn.Module) -> StreamedPasses:
        """Return the moments of all sites, block by block."""
        at = self.sites(model)
        self.widest = max(site.d_in for site in at)
        return StreamedPasses(
            self.store,
            self.batches,
            at,
            self.states,
            keep=self.keep_sums,
            progress=self.progress,
        )

    def score(self, passes: StreamedPasses) -> tuple[dict, dict]:
        """Return the scores of all units, and for ``curve`` the losses of all sites."""
        recipe, probes = self.recipe, None
        if recipe.allocation == "curve":
            given = recipe.budget, recipe.reconstruct, self.states
            probes = ProbeStreams(self.store, passes.batches, *given)
        self.dense = self._judged()
        walk = FirstWalk(self.saved, passes, probes, self.dense)
        scores = walk.restore()
        per = "feature" if recipe.allocation == "global" else "unit"
        chosen = {"seed": recipe.seed, "per": per}
        for group in self.clock.each("calibrate", passes):
            with self.clock("score"):
                # No name is left that holds the block's sums while the next ones are made.
                scores |= share(
                    group,
                    partial(score, self.model, passes.bank, criterion=recipe.criterion, **chosen),
                )
            if probes is not None:
                with self.clock("allocate"):
                    probes.step(passes, group, scores)
            with self.clock("evaluate"):
                self.dense.advance(passes.blocks, passes.index)
            walk.keep(scores)
        self.source = passes.source
        kept = SavedStreams(self.saved, DENSE, len(passes.blocks))
        kept.keep(len(passes.blocks), passes.blocks, self.dense.streams(), now=True)
        if probes is None:
            return scores, {}
        with self.clock("allocate"):
            found = probes.losses(passes.blocks)
        self.notes += notes_of(probes.elsewhere, passes.at)
        self.sensitivities = {name: value for name, (_, value) in found.items()}
        return scores, {name: loss for name, (loss, _) in found.items()}

    def judge(self, passes: StreamedPasses) -> None:
        """Measure the dense model on the text that has passed all of its blocks."""
        if self.dense is None:  # the plan was known
            self.dense = self._judged()
            kept = SavedStreams(self.saved, DENSE, len(passes.blocks))
            kept.restore(passes.blocks, self.dense.streams(), self.states)
        if self.saved is not None and not self.keep_sums:
            self.saved.drop(SUMS)  # which the plan was made of
        with self.clock("evaluate"):
            self.perplexities[0] = self.dense.perplexity(passes.blocks)
            self.dense_outputs = self.dense.outputs(passes.blocks)
        self.dense = None  # its hidden states are needed no more

    def describe(self, limit: int) -> list[str]:
        """Check the job, and return lines on what it would take."""
        self.batches = list(read_batches(self.batches))
        self.check()
        self.make_room(limit)
        store, layerwise = self.store, self.recipe.schedule == "layerwise"
        tokens = sum(map(tokens_of, self.batches))
        held = bytes_of_states(self.model, sites(self.model), tokens, layerwise=layerwise)
        beyond, need = max(0, held - self.states.memory), sum(self.need.values())
        again = "" if self.keep_sums or layerwise else ", twice"
        return [
            f"{type(self.model).__name__}: {count_params(self.model):,} parameters, "
            f"{store.total_bytes / GIB:.3g} GiB in {len(store)} blocks of at most "
            f"{store.block_bytes / GIB:.3g} GiB, read {'with' if store.prefetch else 'without'} "
            "reading ahead",
            f"memory: {need / GIB:.3g} of {limit / GIB:.3g} GiB without hidden states "
            f"(GiB: {in_gib(self.need)})",
            f"hidden states: {held / GIB:.3g} GiB, of which {beyond / GIB:.3g} GiB lie "
            f"in {self.states.folder or 'the output folder'}",
            f"weights: read twice and written once; calibration text summed{again}",
        ]

    @torch.no_grad()
    def write(self, passes: StreamedPasses, plan: Plan, shards: Shards | None) -> Plan:
        """Solve, slice and write one block after the other; return the plan of the dense model."""
        whole = stock_config.from_dense(self.model, plan)
        inputs = [self._fixed_input()] if is_first() else []
        self.fingerprint = Trace(self.store, inputs, self.states)
        pruned = self._judged()
        walk = SecondWalk(self, passes, plan, pruned)
        self.blocks, rows = walk.blocks, walk.rows
        walk.run(shards)
        if shards is not None:
            with self.clock("surgery"), self.store.head():
                shards.add(self.store.tensors())
        self.rows = [rows[name] for name in plan.sites]
        with self.clock("evaluate"):
            self.perplexities[1] = pruned.perplexity(self.blocks)
            certified = pruned.divergence(self.blocks, self.dense_outputs)
        if certified is not None:
            self.fresh = SimpleNamespace(of=lambda _: certified)  # which the report asks for
        self._describe()
        self.model.liar_plan = whole
        return whole

    def _judged(self) -> Judged:
        """Return what is to be measured along a walk: of several ranks the first one does."""
        texts = (self.evaluate_on, self.certify_on) if is_first() else (None, None)
        return Judged(self.store, self.states, *texts, progress=self.progress)

    def _fixed_input(self) -> dict[str, Tensor]:
        """Return the input of the fingerprint, as the model takes it."""
        dtype, inputs = self.model.dtype, fixed_inputs(self.model)
        return {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}

    def _describe(self) -> None:
        """Let the model's config say its new sizes, and the job its numbers."""
        before, after = self.params["before"], count_params(self.model)
        done = {"budget": self.recipe.budget.to_dict(), "params": [before, after]}
        stock_config.describe(self.model, done)
        self.params |= {"after": after}
        self.params["prunable_after"] = sum(row.params_after for row in self.rows)
        self.facts["hidden_states_on_disk"] = self.states.most_on_disk
