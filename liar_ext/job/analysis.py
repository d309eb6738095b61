"""The first half of a job: sums, scores, error curves, sensitivities, and the plan from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from liar_ext.calibration.collect import Passes, check_finite_weights
from liar_ext.calibration.saved_sums import SUMS
from liar_ext.job.state import SENSITIVITY, Job, Speed, per, score_key, sensitivity_key
from liar_ext.job.streamed import StreamedPasses, leave_out
from liar_ext.models.plan import Plan
from liar_ext.models.registry import type_of
from liar_ext.models.sites import Site
from liar_ext.models.slicing import apply_plan
from liar_ext.reconstruction.hidden_size import Narrowing, narrow
from liar_ext.reconstruction.solve import with_bias
from liar_ext.reconstruction.streams import InMemory, StreamedBatches, Walk
from liar_ext.selection.allocation import allocate
from liar_ext.selection.criteria import score
from liar_ext.selection.curve_allocation import (
    losses_of,
    predict_divergence,
    probe_sites,
    probes_of,
    rounding,
    sensitivities_of,
)
from liar_ext.selection.error_curves import energy_shares, error_curves, notes_of
from liar_ext.selection.sensitivity import Measured, site_divergences
from liar_ext.selection.whole_blocks import KeptBlocks, choose_blocks
from liar_ext.selection.whole_experts import KeptExperts, choose_experts
from liar_ext.system.checkpoint_store import reading
from liar_ext.system.distributed import broadcast, share
from liar_ext.system.progress import spare

PLAN = "plan"  # its key in a checkpoint
SAVED = ("facts", "grid", "sensitivities", "notes")  # of a decision


@dataclass(frozen=True)
class Base:
    """The model whose sites are pruned: that of the job, or a copy that lacks something already."""

    model: nn.Module
    at: Sequence[Site]  # what may be pruned
    narrowing: Narrowing | None = None  # hidden features that the copy lacks
    experts: KeptExperts | None = None  # experts that it lacks
    blocks: KeptBlocks | None = None  # blocks that it lacks

    @property
    def source(self) -> Mapping[str, Any]:
        """What it was decided on."""
        none = {"sequences": 0, "tokens": 0}  # where the vocabulary alone is smaller
        return getattr(self.narrowing or self.experts or self.blocks, "source", none)

    @property
    def weights(self) -> Mapping[str, Any]:
        """New weights of what stays in it, beside those of sites."""
        found = {} if self.blocks is None else dict(self.blocks.weights)
        if self.experts is not None:
            return found | self.experts.scales
        return found if self.narrowing is None else found | self.narrowing.weights

    def in_full(self, plan: Plan) -> Plan:
        """Return a plan of its sites with what the copy lacks."""
        if self.narrowing is not None:
            plan = replace(plan, hidden=self.narrowing.kept)
        if self.blocks is not None:
            plan = replace(plan, blocks=self.blocks.plan)
        return plan if self.experts is None else replace(plan, experts=self.experts.plans)


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` finds, by site."""

    scores: dict[str, Tensor]
    losses: dict[str, Tensor]  # for allocation curve
    sensitivities: dict[str, float]  # likewise
    notes: list[str]


@dataclass(frozen=True)
class Decision:
    """The plan of a model's sites, and what the report says of how it was come by."""

    plan: Plan
    facts: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    speed: Speed | None = None  # for a budget of latency


def narrowed(job: Job, along: Sequence[StreamedBatches] = ()) -> Base:
    """Return the model to prune: the job's, or a copy with fewer blocks, features or experts.

    One that is read block by block loses its experts itself. ``along`` is text that passes its
    blocks before.
    """
    recipe, model = job.recipe, job.model
    settings = {"damp": recipe.damp, "mode": recipe.reconstruct}
    narrowing = experts = blocks = None
    if recipe.keep_blocks != 1.0:
        with job.clock("blocks"):
            blocks = choose_blocks(model, job.batches, recipe.keep_blocks, **settings)
            blocks.check(_without(model, {}, blocks=blocks.plan))
            model = _without(model, blocks.weights, blocks=blocks.plan)
    if recipe.keep_experts != 1.0:
        with job.clock("experts"):
            if job.walk is None:
                check_finite_weights(model)  # a store checks what it reads
            walk, how = job.walk or Walk(InMemory(model)), settings | {"along": along}
            experts = choose_experts(walk, job.batches, recipe.keep_experts, **how)
            if job.walk is None:
                model = _without(model, experts.scales, experts=experts.plans)
            else:
                leave_out(walk, experts)
    elif job.narrows:
        with job.clock("narrow"):
            settings |= {"tile": recipe.tile, "memory": recipe.memory}
            narrowing = narrow(model, job.batches, recipe.keep_hidden, **settings)
            model = _without(model, narrowing.weights, hidden=narrowing.kept)
    return Base(model, job.sites(model), narrowing, experts, blocks)


def _without(model: nn.Module, weights: Mapping[str, Any], **gone: Any) -> nn.Module:
    """Return a copy of the dense model that lacks what a plan says, and nothing else."""
    fewer = copy.deepcopy(model)
    apply_plan(fewer, Plan(type_of(model), "auto", {}, **gone), weights)
    return fewer


def passes_of(job: Job, base: Base, along: Sequence[StreamedBatches] = ()) -> Passes | None:
    """Return the moments of all sites, to be summed in groups; None where only a copy is made.

    ``along`` is other text that passes the blocks of a walk.
    """
    if not job.recipe.prunes_sites:
        return None
    if job.walk is not None:
        return StreamedPasses(job, along)
    given = base.model, () if job.batches is None else job.batches, base.at, job.room
    return Passes(*given, bank=job.bank, saved=job.saved)


def analyze(job: Job, passes: Passes) -> Analysis:
    """Return scores, and for allocation ``curve`` losses, group by group of sites."""
    recipe, probes, curve = job.recipe, passes.probes, job.recipe.allocation == "curve"
    scores, curves, sensitivities, shares, elsewhere = {}, {}, {}, {}, {}
    how = {"seed": recipe.seed, "batches": passes.batches, "per": per(recipe)}

    def known(what: str, at: Sequence[Site], compute: Callable) -> dict[str, Tensor]:
        return job.known.get(what, score_key(recipe), at, partial(share, compute=compute))

    def scores_of(some: Sequence[Site]) -> dict[str, Tensor]:
        return score(passes.model, passes.bank, some, recipe.criterion, **how)

    def curves_of(some: Sequence[Site]) -> dict[str, Tensor]:
        return error_curves(passes.model, passes.bank, some, scores, elsewhere=elsewhere)

    kept = {"score": scores, "curve": curves, "shares": shares}
    kept |= {} if probes is None else {"errors": probes.errors}
    passes.restore(kept)
    for group in job.clock.each("calibrate", passes):
        # No name for the bank: its memory is for the next group.
        with job.clock("score"), job.bars():
            scores |= known("score", group, scores_of)
        with job.clock("allocate"), job.bars():
            if curve:
                curves |= known("curve", group, curves_of)
                shares |= energy_shares(passes.model, passes.bank, group)
            if probes is not None:
                probes.step(passes.index, passes.bank, group, scores, curves)
            elif curve:
                sensitivities |= find_sensitivities(job, passes, group, scores, curves)
        passes.finish(kept)
    if probes is not None:
        with job.clock("allocate"):
            sensitivities |= probes.sensitivities()
    losses = losses_of(curves, sensitivities, shares)
    notes = notes_of(elsewhere, job.sites(passes.model))
    return Analysis(scores, losses, sensitivities, notes)


def find_sensitivities(
    job: Job,
    passes: Passes,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the sensitivities of sites of a model in memory, whose moments are at hand."""
    recipe, known, model = job.recipe, job.known, passes.model

    def measure(missing: Sequence[Site]) -> dict[str, float]:
        teams = {site.team for site in missing}  # experts of a layer are measured together
        some = [site for site in at if site.team in teams]
        budget = replace(recipe.budget, keep=known.probe_keep or recipe.keep)
        given = model, passes.bank, some, scores, curves, budget
        probes = probe_sites(*given, mode=recipe.reconstruct)
        given = model, probes_of(model, passes.batches), probes.plan, probes.weights
        found = site_divergences(*given, saved=Measured(job.saved, at[0].name))
        return sensitivities_of(probes.errors, found)

    return known.get(SENSITIVITY, sensitivity_key(recipe, known, model, at), at, measure)


def allocated(job: Job, model: nn.Module, analysis: Analysis) -> Decision:
    """Return the plan that meets the budget."""
    recipe, speed, at, losses = job.recipe, job.timed(model), job.sites(model), analysis.losses
    asked = at, analysis.scores, recipe.budget, recipe.allocation
    costs = job.costs(model) if speed is None else speed.costs
    if speed is not None:
        with job.clock("time"):
            costs = speed.settle(lambda costs: allocate(*asked, costs=costs, losses=losses))
    with job.clock("allocate"):
        plan = allocate(*asked, model_type=type_of(model), costs=costs, losses=losses)
        plan = broadcast(with_bias(plan, model, recipe.reconstruct))  # the same on all machines
        facts = {}
        if recipe.allocation == "curve":
            facts["predicted_divergence"] = predict_divergence(losses, plan)
        grid = rounding(*asked, plan, costs=costs, losses=losses)
    if speed is not None:
        with job.clock("time"):
            speed.time(plan)
    return Decision(plan, facts, grid, analysis.sensitivities, analysis.notes, speed)


def decide_anew(job: Job, passes: Passes | None) -> Decision:
    """Return the plan of a job, of no site where only hidden features or experts go."""
    if passes is not None:
        return allocated(job, passes.model, analyze(job, passes))
    budget, model_type = job.recipe.budget.to_dict(), type_of(job.model)
    plan = Plan(model_type, job.recipe.attn_unit, {}, budget)
    return Decision(plan, speed=job.speed)


def decide(job: Job, passes: Passes | None) -> Decision:
    """Analyze and allocate, or take the plan from the job's checkpoint."""
    if passes is None or job.saved is None:
        return decide_anew(job, passes)
    saved, known = job.saved, job.saved.get(PLAN)
    if known is not None:
        with reading(saved.path(PLAN)):
            return _restored(job, passes, known[1])
    decision = decide_anew(job, passes)
    facts = {name: getattr(decision, name) for name in SAVED}
    source = {name: passes.bank.source[name] for name in ("sequences", "tokens")}
    facts |= {"plan": decision.plan.to_json(), "source": source, "summed": passes.summed}
    saved.put(PLAN, facts=facts | {"said": "the plan"})
    one_pass = job.recipe.schedule == "one-pass" or job.judged is not None
    if not (one_pass if job.walk is None else job.shares.keep_sums):
        saved.drop(SUMS)  # which a walk alone doesn't need
    return decision


def _restored(job: Job, passes: Passes, facts: Mapping[str, Any]) -> Decision:
    passes.summed = facts["summed"]
    passes.bank.source |= facts["source"]
    spare("calibrate", None if job.walk is None else len(job.walk.blocks))  # of the first walk
    for stage in ("gradients", "curves", "sensitivity"):
        spare(stage)
    spare("reconstruct", len(job.sites(job.model)) if job.recipe.allocation == "curve" else 0)
    return Decision(Plan.from_json(facts["plan"]), **{name: facts[name] for name in SAVED})
