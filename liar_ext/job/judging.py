"""Text that decides nothing: what the dense and the pruned model give on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from liar_ext.calibration.batches import Batch, read_batch, read_batches
from liar_ext.distributed import alone, is_first
from liar_ext.job.preparing import Job
from liar_ext.measure.embeddings import Evaluator
from liar_ext.measure.evaluation import perplexity
from liar_ext.reconstruction.streams import StreamedBatches
from liar_ext.selection.divergence import Divergence


class Judge:
    """Measures a model in memory: on held-out text at the first rank, on fresh text at all."""

    along: tuple[StreamedBatches, ...] = ()  # text that passes the blocks of a walk

    def __init__(self, job: Job) -> None:
        self.job, self.outputs, self.evaluator = job, None, Evaluator()
        self.dense = self.quality()

    def quality(self) -> dict[str, float] | None:
        """Measure the model as it is now, if there is held-out text."""
        job = self.job
        if job.evaluate_on is None or not is_first():
            return None
        with job.clock("evaluate"):
            return self.evaluator(job.model, job.evaluate_on, progress=job.progress)

    def see_dense(self, passes: Any) -> None:
        """Note what the dense model gives on fresh text, before it is sliced."""
        if self.job.certify_on is not None:
            with self.job.clock("certify"):
                self.outputs = Divergence(self.job.model, self.job.certify_on)

    def evaluation(self) -> dict[str, dict[str, float]]:
        """Measure the pruned model; return all that was measured, as a report has it."""
        found = {"dense": self.dense, "pruned": self.quality()}
        found = {} if None in found.values() else found
        if self.outputs is not None:
            with self.job.clock("certify"), self.fresh():
                found["certified"] = self.outputs.of(self.job.model)
        return found

    def fresh(self) -> AbstractContextManager:
        """Let the model answer for fresh text."""
        return nullcontext()


class StreamedJudge(Judge):
    """Measures a model of which one block is in memory, at the first rank.

    Its text passes the blocks in both walks, after them only the head is run.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.outputs = job, None
        self.along = self._texts()

    def _texts(self) -> tuple[StreamedBatches, StreamedBatches]:
        job, here = self.job, is_first()
        held_out = map(_as_judged, read_batches(job.evaluate_on or ())) if here else ()
        fresh = read_batches(job.certify_on or ()) if here else ()
        given = {"held out": held_out, "fresh": fresh}
        return tuple(StreamedBatches(name, job.walk, some) for name, some in given.items())

    def quality(self) -> dict[str, float] | None:
        """Measure the model on held-out text that is past its last block."""
        text = self.along[0]
        with self.job.clock("evaluate"):
            if not text.batches:
                return None
            with text.answering():
                return perplexity(self.job.model, text.batches, progress=self.job.progress)

    def see_dense(self, passes: Any) -> None:
        """Note what the dense model gives, after its walk, and begin again for the other."""
        passes.restore_along()
        self.dense = self.quality()
        fresh = self.along[1]
        if fresh.batches:
            with self.job.clock("evaluate"), self.fresh():
                self.outputs = Divergence(self.job.model, [each.inputs for each in fresh.batches])
        for each in self.along:
            each.hidden.clear()  # needed no more
        self.along = self._texts()

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Let the model answer for fresh text that is past its last block, at this rank alone."""
        with self.along[1].answering(), alone():
            yield


def _as_judged(batch: Batch) -> Batch:
    """Return a batch as the model gets it where its perplexity is measured."""
    ids = batch.inputs["input_ids"]
    mask = ids.new_ones(ids.shape) if batch.mask is None else batch.mask.to(ids.dtype)
    return read_batch({"input_ids": ids, "attention_mask": mask})
