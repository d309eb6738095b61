"""The schedule ``auto``: solve in one pass and layer by layer, and keep what measures better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch
from liar_ext.calibration.passes import Passes
from liar_ext.models.sites import Site
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.reconstruction.one_pass import reconstruct_shared
from liar_ext.rows import SiteRow
from liar_ext.selection.divergence import Divergence
from liar_ext.selection.sensitivity import pruned_site

Weights = dict[str, tuple[Tensor, Tensor | None]]
# Of a calibration set with enough sequences every n-th is held out, up to so many.
HELD_OUT_EVERY, LEAST, MOST = 8, 32, 64
SCHEDULES = ("one-pass", "layerwise")  # the cheaper one first
HOW = {"one-pass": "in one pass", "layerwise": "layer by layer"}
JUDGED = 16  # sequences of documents of their own that the command draws, of 128 or more


def sequences_to_judge(recipe: Recipe) -> int:
    """Return how many sequences a command draws beside those of the recipe, to judge models by."""
    auto = recipe.schedule == "auto" and recipe.settled().schedule == "layerwise"
    return min(max(recipe.samples // HELD_OUT_EVERY, FOLDS), JUDGED) if auto else 0


def hold_out(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those to calibrate on and those to judge whole models by.

    Every eighth sequence of text is held out, 64 at most. Random and generated sequences
    (``source`` -1) are not. A set of fewer than 32 sequences stays whole.
    """
    batches = list(batches)
    places = [
        (index, row)
        for index, batch in enumerate(batches)
        for row in range(len(batch))
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


@dataclass(frozen=True)
class Solved:
    """What became of a plan's sites, and in the end of the model."""

    rows: Sequence[SiteRow]
    schedule: str
    source: Mapping[str, int]  # of the text that was calibrated on
    weights: Weights = field(default_factory=dict)  # until the model is sliced
    facts: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    plan: Plan | None = None  # of the dense model
    dense: Mapping[str, float] | None = None  # on held-out text
    pruned: Mapping[str, float] | None = None
    certified: Mapping[str, float] | None = None  # on fresh text


def solve(job: Any, passes: Passes | None, plan: Plan, source: Mapping[str, int]) -> Solved:
    """Solve the sites of a :class:`~liar_ext.job.preparing.Job`, by its schedule or the better one.

    Where text is held out for it, both are measured; of equal ones the cheaper is kept. A walk
    measures its errors on fresh text on its way. Without ``passes`` there is nothing to solve;
    ``source`` is then of the text that was calibrated on.
    """
    schedule = job.recipe.schedule
    if passes is None:
        return Solved([], schedule, source)
    if job.judged is None:
        weights, rows = _solve(job, schedule, passes, plan)
        facts = {"calibrate_passes": passes.taken}
        return Solved(rows, schedule, passes.bank.source, weights, facts)
    with job.clock("judge"):
        judge = Divergence(job.model, job.judged)
    at, found, best = job.sites(passes.model), {}, ()
    for each in SCHEDULES:
        solved = _solve(job, each, passes, plan)
        with job.clock("judge"):
            found[each] = divergence_of(judge, passes.model, at, plan, solved[0])
        if not best or found[each] < found[schedule]:
            schedule, best = each, solved
    values = " and ".join(f"{value:.3g} {HOW[name]}" for name, value in found.items())
    said = (
        f"Layers were solved {HOW[schedule]}: on held-out text the whole pruned model diverges "
        f"from the dense one by {values}."
    )
    facts = {"calibrate_passes": passes.taken, "schedules": found}
    return Solved(best[1], schedule, passes.bank.source, best[0], facts, [said])


def _solve(job: Any, schedule: str, passes: Passes, plan: Plan) -> tuple[Weights, list[SiteRow]]:
    """Return new weights by a schedule, and the rows of the report."""
    settings = {"mode": job.recipe.reconstruct, "damp": job.recipe.damp, "progress": job.progress}
    if schedule == "layerwise":
        settings |= {"fresh": job.certify_on or (), "saved": job.saved}
        with job.clock("reconstruct"):
            return reconstruct_layerwise(passes.model, passes.batches, plan, **settings)
    found = {}
    for group in job.clock.each("calibrate", passes.back()):
        with job.clock("reconstruct"):
            found |= reconstruct_shared(
                passes.model, passes.bank, plan, group, **settings
            )  # a name for the bank would keep it while the next group's is summed
    return {name: found[name][0] for name in found}, [found[name][1] for name in plan.sites]


@torch.no_grad()
def divergence_of(
    judge: Divergence,
    model: nn.Module,
    at: Iterable[Site],
    plan: Plan,
    weights: Weights,
) -> float:
    """Return how far a model is from the judge's dense one with all its sites pruned."""
    with ExitStack() as pruned:
        for site in at:
            pruned.enter_context(pruned_site(model, site, plan, weights[site.name]))
        found = judge.of(model)["divergence"]
    return math.inf if math.isnan(found) else found
