"""Prune a model into a folder, if it must be with one block in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from liar_ext.calibration.batches import read_batch, read_batches
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.fingerprint import fixed_inputs
from liar_ext.checkpoint.saving import Shards, check_folder, fill_folder, writing
from liar_ext.checkpoint_store import RESULT
from liar_ext.distributed import is_first
from liar_ext.job.preparing import Job
from liar_ext.job.pruning import run
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.report.report import Report


def prune_folder(
    store: BlockStore | None,
    job: Job,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    annotate: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Prune a model and save it, as :func:`liar_ext.prune` and :func:`liar_ext.save_pruned` do.

    With a ``store`` the model is read block by block and written as it is solved, so that it is
    never whole in memory. Of several ranks each calls this alike; the first one writes the folder.

    Parameters
    ----------
    store : BlockStore, optional
        The dense model and its tokenizer, unless the job's model is in memory.
    job : Job
        Of its model; with a store within ``limit`` bytes for each process, see
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
    with ExitStack() as stack:
        out = Folder(lambda: stack.enter_context(writing(folder, overwrite, checked=True)))
        if store is not None:
            walk = Walk(store, job.recipe.attn_unit, job.saved, job.progress)
            stack.callback(store.close)
            stack.callback(walk.states.close)
            parents = Path(folder).resolve().parents
            walk.states.folder = next(path for path in parents if path.is_dir())
            out.walk_along(walk)
            batches, tokenizer = list(read_batches(job.batches)), store.tokenizer
            job = replace(job, batches=batches, walk=walk, out=out)
        report = run(job)
        if is_first():
            annotate(report)
            if job.saved is not None:
                job.saved.put(RESULT, facts={"plan": report.plan.to_json()})
            out.complete(job.model, report, tokenizer)
    return report


class Folder:
    """The folder of a pruned model, written by the first rank; blocks go there as they are solved.

    ``begin`` returns the path to write to, when there is something. ``fixed`` passes the blocks,
    too: the input that the folder is verified by.
    """

    def __init__(self, begin: Callable[[], Path]) -> None:
        self.begin, self.walk, self.shards = begin, None, None

    def walk_along(self, walk: Walk) -> None:
        """Take the blocks of a walk."""
        dtype, inputs = walk.model.dtype, fixed_inputs(walk.model)
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        fixed = [read_batch(given)] if is_first() else []
        self.walk, self.fixed = walk, StreamedBatches("fingerprint", walk, fixed)

    def add(self, index: int | None, size: int) -> None:
        """Write a block, or what lies outside of the blocks, in shards of ``size`` bytes."""
        if not is_first():
            return
        if self.shards is None:
            self.path = self.begin()
            self.shards = Shards(self.walk.model, self.path, size)
        with self.walk.source.head() if index is None else nullcontext():
            self.shards.add(self.walk.source.tensors(index))

    def complete(self, model: nn.Module, report: Report, tokenizer: Any) -> None:
        """Write all else that a folder has."""
        path = self.begin() if self.shards is None else self.path
        with nullcontext() if self.walk is None else self.fixed.answering():
            given = {"report": report, "tokenizer": tokenizer, "shards": self.shards}
            fill_folder(model, path, report.plan, **given)
