"""Solve a plan's sites, by one schedule or the better of two, and judge what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import FOLDS, Batch, Batches, read_batch, read_batches
from liar_ext.calibration.collect import Passes
from liar_ext.calibration.divergence import Divergence
from liar_ext.job.state import Job
from liar_ext.measure.embeddings import Evaluator
from liar_ext.models.plan import Plan
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import Site
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.layerwise import Solved as Block
from liar_ext.reconstruction.layerwise import reconstruct_layerwise, solve_layerwise
from liar_ext.reconstruction.rows import SiteRow
from liar_ext.reconstruction.solve import error_on, reconstruct_shared
from liar_ext.reconstruction.streams import StreamedBatches, Weights
from liar_ext.selection.sensitivity import pruned_site
from liar_ext.system.distributed import alone, is_first

# Of a calibration set with enough sequences every n-th is held out, up to so many.
HELD_OUT_EVERY, LEAST, MOST = 8, 32, 64
# The cheaper one first.
SCHEDULES = ("one-pass", "layerwise")
JUDGED = 16  # sequences of documents of their own that the command draws, of 128 or more


def sequences_to_judge(recipe: Recipe) -> int:
    """Return how many sequences a command draws beside those of the recipe, to judge models by."""
    auto = recipe.schedule == "auto" and recipe.settled().schedule == "layerwise"
    judges = auto and recipe.prunes_sites
    return min(max(recipe.samples // HELD_OUT_EVERY, FOLDS), JUDGED) if judges else 0


def hold_out(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those to calibrate on and those to judge whole models by.

    Every eighth sequence of text is held out, 64 at most, in one fold after the other. Random and
    generated sequences (``source`` -1) are not. A set of fewer than 32 sequences stays whole.
    """
    batches = list(batches)
    places = [
        (index, row)
        for fold in range(FOLDS)
        for index, batch in enumerate(batches)
        for row in (batch.fold == fold).nonzero().flatten().tolist()
        if batch.source is None or batch.source[row] >= 0
    ]
    if len(places) < LEAST:
        return batches, []
    count = min(len(places) // HELD_OUT_EVERY, MOST)
    taken = {places[(2 * step + 1) * len(places) // (2 * count)] for step in range(count)}
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    for index, batch in enumerate(batches):
        judged = torch.tensor([(index, row) in taken for row in range(len(batch))])
        for part, rows in zip(parts, ((~judged).nonzero(), judged.nonzero()), strict=True):
            if len(rows):
                part.append(batch.select(rows.flatten()))
    return parts


@dataclass
class Solved:
    """The sites of a plan, solved as ``blocks`` are gone through, before they are sliced.

    A model in memory is one block, of index None.
    """

    blocks: Iterable[tuple[int | None, Weights, Mapping[str, SiteRow]]]
    schedule: str
    source: Mapping[str, int]  # of the text that was calibrated on
    facts: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def reconstruct(job: Job, passes: Passes | None, plan: Plan, evaluation: Evaluation) -> Solved:
    """Solve the sites of a plan; block by block text to evaluate on passes the blocks, too."""
    recipe, walk = job.recipe, job.walk
    if walk is None:
        none = Solved([(None, {}, {})], recipe.schedule, {})
        return none if passes is None else solve(job, passes, plan)
    facts = {"max_memory": job.limit}

    def blocks() -> Iterator[Block]:
        along, how = [job.out.fixed, *evaluation.along], (recipe.reconstruct, recipe.damp)
        if passes is None or recipe.schedule == "layerwise":
            yield from solve_layerwise(walk, plan, *how, job.batches, job.certify_on or (), along)
        else:
            yield from passes.solve(plan, along)
        facts["calibrate_passes"] = 0 if passes is None else len(passes.summed)
        facts["hidden_states_on_disk"] = walk.states.most_on_disk

    source = {} if passes is None else passes.bank.source
    return Solved(job.clock.each("reconstruct", blocks()), recipe.schedule, source, facts)


def solve(job: Job, passes: Passes, plan: Plan) -> Solved:
    """Solve the sites of a model in memory by the job's schedule, or by both.

    Where text is held out for it, both are measured; of equal ones the cheaper is kept. Errors on
    fresh text are measured on a walk's way, and after one pass here.
    """
    schedule, found = job.recipe.schedule, {}
    if job.judged is None:
        weights, rows = _solve(job, schedule, passes, plan)
    else:
        with job.clock("judge"):
            judge, at = Divergence(job.model, job.judged), job.sites(passes.model)
        for each in SCHEDULES:
            solved = _solve(job, each, passes, plan)
            with job.clock("judge"):
                found[each] = divergence_of(judge, passes.model, at, plan, solved[0])
            if len(found) == 1 or found[each] < found[schedule]:
                schedule, (weights, rows) = each, solved
    facts = {"calibrate_passes": len(passes.summed)} | ({"schedules": found} if found else {})
    source = passes.bank.source
    if job.certify_on is not None and schedule == "one-pass":
        with job.clock("certify"):
            passes.bank = MomentBank()  # its memory is for the fresh sums
            text = passes.model, job.certify_on, job.sites(passes.model), job.room
            unseen = Passes(*text)  # no decision saw it: without bias
            for site in (site for group in unseen for site in group):
                new = passes.model, site, plan, weights[site.name]
                error = error_on(*new, unseen.bank[site.name])  # a name would keep the sums
                rows[site.name] = replace(rows[site.name], certified_error=error)
    return Solved([(None, weights, rows)], schedule, source, facts)


def _solve(
    job: Job, schedule: str, passes: Passes, plan: Plan
) -> tuple[Weights, dict[str, SiteRow]]:
    settings = {"mode": job.recipe.reconstruct, "damp": job.recipe.damp}
    if schedule == "layerwise":
        settings |= {"fresh": job.certify_on or (), "saved": job.saved}
        with job.clock("reconstruct"):
            weights, rows = reconstruct_layerwise(passes.model, passes.batches, plan, **settings)
        return weights, {row.name: row for row in rows}
    weights, rows = {}, {}
    for group in job.clock.each("calibrate", passes.back()):
        with job.clock("reconstruct"):
            # A name for the bank would keep it while the next group's is summed.
            some = reconstruct_shared(passes.model, passes.bank, plan, group, **settings)
            weights, rows = weights | some[0], rows | some[1]
    return weights, rows


@torch.no_grad()
def divergence_of(
    judge: Divergence, model: nn.Module, at: Iterable[Site], plan: Plan, weights: Weights
) -> float:
    """Return how far a model is from the judge's dense one with all its sites pruned."""
    with ExitStack() as pruned:
        for site in at:
            pruned.enter_context(pruned_site(model, site, plan, weights[site.name]))
        found = judge.of(model)["divergence"]
    return math.inf if math.isnan(found) else found


class Evaluation:
    """Measures a model: on held-out text at the first rank, on fresh text at all.

    Of a model that has one block in memory, at the first rank: both texts are ``along``, and pass
    the blocks in both walks, after which only the head is run.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.outputs, self.evaluator = job, None, Evaluator()
        self.along = self._texts()
        self.dense = None if self.along else self.quality()

    def _texts(self) -> tuple[StreamedBatches, ...]:
        job = self.job
        if job.walk is None:
            return ()
        given = (job.evaluate_on, job.certify_on) if is_first() else ((), ())
        held_out, fresh = (read_batches(text or ()) for text in given)
        if predicts_next_token(job.model):
            held_out = map(_as_judged, held_out)
        named = {"held out": held_out, "fresh": fresh}
        return tuple(StreamedBatches(name, job.walk, some) for name, some in named.items())

    def _text(self, which: int) -> Batches | None:
        """Return held-out text, 0, or fresh text, 1, if this rank has some."""
        if self.along:
            return self.along[which].batches or None
        return (self.job.evaluate_on if is_first() else None, self.job.certify_on)[which]

    @contextmanager
    def _measuring(self, stage: str, which: int) -> Iterator[None]:
        """Let the model answer for a text, at this rank alone if that is past the last block."""
        with ExitStack() as stack:
            stack.enter_context(self.job.clock(stage))
            if self.along:
                stack.enter_context(self.along[which].answering())
                stack.enter_context(alone())
            yield

    def quality(self) -> dict[str, float] | None:
        """Measure the model as it is now, if there is held-out text."""
        if (text := self._text(0)) is None:
            return None
        with self._measuring("evaluate", 0):
            return self.evaluator(self.job.model, text)

    def see_dense(self, passes: Passes | None = None) -> None:
        """Note what the dense model gives on fresh text, before it is sliced.

        After its walk also on held-out text; both begin again then, for the other one.
        """
        if self.along:
            if passes is not None:
                passes.passed.restore()
            self.dense = self.quality()
        if (text := self._text(1)) is not None:
            with self._measuring("certify", 1):
                self.outputs = Divergence(self.job.model, text)
        for each in self.along:
            each.hidden.clear()  # needed no more
        self.along = self._texts()

    def result(self) -> dict[str, dict[str, float]]:
        """Measure the pruned model; return all that was measured, as a report has it."""
        found = {"dense": self.dense, "pruned": self.quality()}
        found = {} if None in found.values() else found
        if self.outputs is not None:
            with self._measuring("certify", 1):
                found["certified"] = self.outputs.of(self.job.model)
        return found


def _as_judged(batch: Batch) -> Batch:
    """Return a batch as the model gets it where its perplexity is measured."""
    ids = batch.inputs["input_ids"]
    mask = ids.new_ones(ids.shape) if batch.mask is None else batch.mask.to(ids.dtype)
    return read_batch({**batch.inputs, "attention_mask": mask})
