"""The second walk of a streamed job: every block is solved, sliced and written, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from liar_ext.bars import Bar, spare
from liar_ext.checkpoint.shards import Shards
from liar_ext.data.hidden_states import Held
from liar_ext.models.running import evaluating
from liar_ext.models.sites import sites
from liar_ext.plan import Plan
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.one_pass import reconstruct_shared
from liar_ext.reconstruction.saved_walk import SavedStreams, Weights, keep_block, kept_block
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.rows import SiteRow
from liar_ext.streaming.first_walk import kept_sums
from liar_ext.streaming.judging import Judged
from liar_ext.streaming.passes import StreamedPasses
from liar_ext.surgery.units import apply_plan

if TYPE_CHECKING:
    from liar_ext.streaming.job import StreamedJob

Streams = dict[str, list[Held]]
# A block, its new weights, and what gives the streams of the walk; None: it was solved before.
Step = tuple[int, Weights, Callable[[], Streams] | None]


class SecondWalk:
    """Solves, slices and writes one block after the other, by a plan.

    A walk that was stopped goes on where its streams were kept; the blocks before that are sliced
    and written by the weights that were kept.

    Parameters
    ----------
    job : StreamedJob
        With its fingerprint, which walks along.
    passes : StreamedPasses
        The sums, for a job in one pass.
    plan : Plan
        What stays.
    pruned : Judged
        The text that the pruned model is judged on.

    Attributes
    ----------
    blocks : Blocks
        The blocks.
    rows : dict of str to SiteRow
        Of the sites of the blocks that are done.
    """

    def __init__(
        self, job: StreamedJob, passes: StreamedPasses, plan: Plan, pruned: Judged
    ) -> None:
        self.job, self.passes, self.plan, self.pruned = job, passes, plan, pruned
        self.layerwise = job.recipe.schedule == "layerwise"
        self.every = sites(job.model, attn_unit=plan.attn_unit)
        self.blocks = Blocks(job.model, self.every) if self.layerwise else passes.blocks
        self.rows: dict[str, SiteRow] = {}
        self.numbers: Sequence[int] = passes.numbers  # of this rank's calibration text
        self.kept = SavedStreams(job.saved, "pruning", len(job.store), self._numbers)

    def run(self, shards: Shards | None) -> None:
        """Walk over all blocks; of several ranks the first one alone has shards to write."""
        job, blocks = self.job, self.blocks
        for index, weights, streams in self._layerwise() if self.layerwise else self._one_pass():
            if streams is not None:
                keep_block(job.saved, index, weights, self.rows)
            with job.clock("surgery"):
                if streams is not None:
                    job.fingerprint.begin(blocks)
                apply_plan(job.model, self.plan, weights, blocks=[index])
                if streams is not None:
                    job.fingerprint.advance(blocks, index)
                if shards is not None:
                    shards.add(job.store.tensors(index))
            if streams is not None:
                with job.clock("evaluate"):
                    self.pruned.advance(blocks, index)
                self.kept.keep(index + 1, blocks, streams() | self._along())
        job.facts["calibrate_passes"] = self.passes.taken

    def _one_pass(self) -> Iterator[Step]:
        """Yield the new weights of each block, solved on the dense model's moments."""
        job, passes = self.job, self.passes
        settings = {"mode": job.recipe.reconstruct, "damp": job.recipe.damp}
        streams = {} if passes.keep else {"text": passes.hidden}
        passes.hidden.clear()
        passes.first = self._restore(streams)
        yield from self._again(passes.first)
        if passes.keep and not passes.kept:  # the plan was known
            blocks = range(passes.first, len(self.blocks))
            passes.kept = kept_sums(job.saved, blocks)
        for group in job.clock.each("calibrate", passes.back()):
            with job.clock("reconstruct"):
                found = reconstruct_shared(job.model, passes.bank, self.plan, group, **settings)
                self.rows |= {name: row for name, (_, row) in found.items()}
            weights = {name: given for name, (given, _) in found.items()}
            yield passes.index, weights, lambda: streams
            found.clear()  # the next block is solved without them
            weights.clear()

    def _layerwise(self) -> Iterator[Step]:
        """Yield the new weights of each block, solved on what the pruned blocks before it give."""
        job, recipe = self.job, self.job.recipe
        settings = recipe.reconstruct, recipe.damp
        planned = [site.block for site in self.every if site.name in self.plan.sites]
        with evaluating(job.model), self.blocks.opened():
            walk = LayerwiseSolver(job.model, self.blocks, self.plan, *settings, job.states)
            with job.clock("reconstruct"):
                walk.start(job.batches, job.certify_on or ())
            self.numbers = walk.numbers
            done = self._restore(walk.streams())
            yield from self._again(done)
            spare("layerwise", done)
            steps, every = range(done, len(self.blocks)), len(self.blocks)
            bar = {"initial": done, "total": every, "disable": not job.progress}
            for index in Bar(steps, desc="layerwise, walk 2", **bar):
                with job.store.block(index):
                    if index <= max(planned, default=-1):
                        with job.clock("reconstruct"):
                            walk.step(index)
                    self.rows |= walk.rows
                    yield index, walk.weights, walk.streams
                    walk.weights.clear()

    def _again(self, done: int) -> Iterator[Step]:
        """Yield the weights of the blocks that were solved before."""
        for index in range(done):
            weights, rows = kept_block(self.job.saved, index)
            self.rows |= rows
            with self.job.store.block(index):
                yield index, weights, None

    def _restore(self, streams: Streams) -> int:
        """Take all that walks along to where it was kept; return how many blocks that is past."""
        return self.kept.restore(self.blocks, streams | self._along(), self.job.states)

    def _numbers(self, name: str) -> Sequence[int] | None:
        """Return which hidden states of a stream this rank has; the first one has all it judges."""
        return None if name in ("fingerprint", "held out", "fresh") else self.numbers

    def _along(self) -> Streams:
        """Return the hidden states that walk along and take no part in a solve."""
        return {"fingerprint": self.job.fingerprint.hidden, **self.pruned.streams()}
