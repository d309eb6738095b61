"""Prune a folder of weights into another one, with one block in memory at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from liar_ext.calibration.batches import read_batch, read_batches
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.fingerprint import fixed_inputs
from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
from liar_ext.checkpoint.weights import Shards
from liar_ext.checkpoint_store import RESULT
from liar_ext.distributed import is_first
from liar_ext.job.preparing import Job
from liar_ext.job.pruning import run
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
    never whole in memory. Of several ranks each calls this alike; the first one writes the folder.

    Parameters
    ----------
    store : BlockStore
        The dense model.
    job : Job
        Of its model, within ``limit`` bytes for each process; see
        :func:`liar_ext.job.streamed.check_blocks` for what can't be asked.
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
    walk = Walk.of(store, job.recipe.attn_unit, job.saved, job.progress)
    walk.states.folder = next(path for path in Path(folder).resolve().parents if path.is_dir())
    with ExitStack() as stack:
        stack.callback(store.close)
        stack.callback(walk.states.close)
        out = Folder(walk, lambda: stack.enter_context(writing(folder, overwrite, checked=True)))
        report = run(replace(job, batches=list(read_batches(job.batches)), walk=walk, out=out))
        if is_first():
            annotate(report)
            if job.saved is not None:
                job.saved.put(RESULT, facts={"plan": report.plan.to_json()})
            out.complete(report)
    return report


class Folder:
    """The folder of a pruned model: blocks are written as they are solved, by the first rank.

    ``begin`` returns the path to write to; it is called when the first block is solved. ``fixed``
    passes the blocks, too: the input that the folder is verified by.
    """

    def __init__(self, walk: Walk, begin: Callable[[], Path]) -> None:
        self.walk, self.begin, self.shards = walk, begin, None
        dtype, inputs = walk.model.dtype, fixed_inputs(walk.model)
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        self.fixed = StreamedBatches("fingerprint", walk, [read_batch(given)] * is_first())

    def add(self, index: int, size: int) -> None:
        """Write a block, in shards of ``size`` bytes."""
        if not is_first():
            return
        if self.shards is None:
            self.path = self.begin()
            self.shards = Shards(self.walk.model, self.path, size)
        self.shards.add(self.walk.source.tensors(index))

    def add_rest(self) -> None:
        """Write what lies outside of the blocks."""
        if is_first():
            with self.walk.source.head():
                self.shards.add(self.walk.source.tensors())

    def complete(self, report: Report) -> None:
        """Write all else that a folder has."""
        store = self.walk.source
        given = {"report": report, "tokenizer": store.tokenizer, "shards": self.shards}
        with self.fixed.answering():
            fill_folder(store.model, self.path, report.plan, **given, start=time.perf_counter())
