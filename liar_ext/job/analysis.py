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
from liar_ext.job.state import SENSITIVITY, Evaluation, Job, Speed, per, score_key, sensitivity_key
from liar_ext.job.streamed import StreamedPasses, leave_out
from liar_ext.models.plan import Plan
from liar_ext.models.registry import type_of
from liar_ext.models.sites import Site
from liar_ext.models.slicing import apply_plan
from liar_ext.reconstruction.hidden_size import narrow
from liar_ext.reconstruction.solve import SiteRow, with_bias
from liar_ext.reconstruction.streams import InMemory, Walk
from liar_ext.selection.allocation import allocate
from liar_ext.selection.criteria import score
from liar_ext.selection.error_curves import (
    energy_shares,
    error_curves,
    losses_of,
    predict_divergence,
    probe_sites,
    probes_of,
    rounding,
    sensitivities_of,
)
from liar_ext.selection.sensitivity import Measured, site_divergences
from liar_ext.selection.whole_blocks import choose_blocks
from liar_ext.selection.whole_experts import choose_experts
from liar_ext.system.checkpoint_store import reading
from liar_ext.system.distributed import broadcast, share
from liar_ext.system.progress import spare

PLAN = "plan"  # its key in a checkpoint
SAVED = ("facts", "grid", "sensitivities")  # of a decision


@dataclass(frozen=True)
class Base:
    """The model whose sites are pruned: that of the job, or a copy that lacks something already."""

    model: nn.Module
    at: Sequence[Site]  # that may be pruned
    gone: Mapping[str, Any]  # fields of a plan: blocks, experts, hidden
    weights: Mapping[str, Any]  # new weights of the rest, beside those of sites
    rows: Sequence[SiteRow]  # of blocks and experts
    hidden: Sequence[SiteRow]  # of hidden features
    grid: Mapping[str, Any]  # likewise
    source: Mapping[str, Any]  # of the text that decided
    settings: Mapping[str, Any]  # for the report


@dataclass(frozen=True)
class Analysis:
    """The results of :func:`analyze` by site."""

    scores: dict[str, Tensor]
    losses: dict[str, Tensor]  # for allocation curve
    sensitivities: dict[str, float]  # likewise


@dataclass(frozen=True)
class Decision:
    """The plan of a model's sites, with facts for the report."""

    plan: Plan
    facts: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    speed: Speed | None = None  # for a budget of latency


def narrowed(job: Job, evaluation: Evaluation | None = None) -> Base:
    """Return the model to prune: the job's, or a copy with fewer blocks, features or experts.

    A model that is read block by block loses its experts itself, after ``evaluation`` of the dense.
    """
    recipe, model, walk = job.recipe, job.model, job.walk
    how = {"damp": recipe.damp, "mode": recipe.reconstruct}
    gone, weights, rows, hidden, grid, settings, of_blocks = {}, {}, [], [], {}, {}, {}
    source = {"sequences": 0, "tokens": 0}  # where the vocabulary alone is smaller
    if recipe.keep_blocks != 1.0:
        with job.clock("blocks"):
            blocks = choose_blocks(model, job.batches, recipe.keep_blocks, **how)
            blocks.check(_without(model, {}, blocks=blocks.plan))
            model = _without(model, blocks.weights, blocks=blocks.plan)
        gone["blocks"], source, of_blocks = blocks.plan, blocks.source, blocks.divergences
        weights, rows = dict(blocks.weights), [*blocks.rows]
    if recipe.keep_experts != 1.0:
        with job.clock("experts"):
            if walk is None:
                check_finite_weights(model)  # a store checks what it reads
            along = () if evaluation is None else evaluation.along
            given = walk or Walk(InMemory(model)), job.batches, recipe.keep_experts
            experts = choose_experts(*given, **how, along=along)
            if walk is None:
                model = _without(model, experts.scales, experts=experts.plans)
            else:
                leave_out(walk, experts)
        if walk is not None:
            evaluation.see_dense()
        gone["experts"], source = experts.plans, experts.source
        weights, rows = weights | experts.scales, [*rows, *experts.rows]
        settings = {"expert_scales": experts.divergences} if experts.divergences else {}
    elif job.narrows:
        with job.clock("narrow"):
            given = model, job.batches, recipe.keep_hidden
            found = narrow(*given, **how, tile=recipe.tile, memory=recipe.memory)
            model = _without(model, found.weights, hidden=found.kept)
        gone["hidden"], source, hidden = found.kept, found.source, found.rows
        weights = weights | found.weights
        grid = {"tile": recipe.tile, "hidden": found.grid}
        settings = {"narrow_passes": source["passes"]}
    if of_blocks:
        settings["blocks_gone"] = of_blocks
    return Base(model, job.sites(model), gone, weights, rows, hidden, grid, source, settings)


def _without(model: nn.Module, weights: Mapping[str, Any], **gone: Any) -> nn.Module:
    """Return a copy of the dense model without some parts, and with all sites."""
    fewer = copy.deepcopy(model)
    apply_plan(fewer, Plan(type_of(model), "auto", {}, **gone), weights)
    return fewer


def passes_of(job: Job, base: Base, evaluation: Evaluation | None = None) -> Passes | None:
    """Return the moments of all sites, to be summed in groups; None where only a copy is made."""
    if not job.recipe.prunes_sites:
        return None
    if job.walk is not None:
        return StreamedPasses(job, () if "experts" in base.gone else evaluation.along)
    batches = () if job.batches is None else job.batches
    return Passes(base.model, batches, base.at, job.room, bank=job.bank, saved=job.saved)


def analyze(job: Job, passes: Passes) -> Analysis:
    """Return scores, and for allocation ``curve`` losses, group by group of sites."""
    recipe, probes, curve = job.recipe, passes.probes, job.recipe.allocation == "curve"
    scores, curves, sensitivities, shares = {}, {}, {}, {}
    how = {"seed": recipe.seed, "batches": passes.batches, "per": per(recipe)}

    def known(what: str, at: Sequence[Site], compute: Callable) -> dict[str, Tensor]:
        return job.known.get(what, score_key(recipe), at, partial(share, compute=compute))

    def scores_of(some: Sequence[Site]) -> dict[str, Tensor]:
        return score(passes.model, passes.bank, some, recipe.criterion, **how)

    def curves_of(some: Sequence[Site]) -> dict[str, Tensor]:
        return error_curves(passes.model, passes.bank, some, scores)

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
    return Analysis(scores, losses_of(curves, sensitivities, shares), sensitivities)


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
    return Decision(plan, facts, grid, analysis.sensitivities, speed)


def decide_anew(job: Job, passes: Passes | None) -> Decision:
    """Return the plan of a job; it has no sites if only hidden features, experts or blocks go."""
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
        facts, sites = known[1], len(job.sites(job.model))
        spare("calibrate", None if job.walk is None else len(job.walk.blocks))  # of the first walk
        for stage in ("gradients", "curves", "sensitivity"):
            spare(stage)
        spare("reconstruct", sites if job.recipe.allocation == "curve" else 0)
        with reading(saved.path(PLAN)):
            passes.summed = facts["summed"]
            passes.bank.source |= facts["source"]
            return Decision(Plan.from_json(facts["plan"]), **{name: facts[name] for name in SAVED})
    decision = decide_anew(job, passes)
    facts = {name: getattr(decision, name) for name in SAVED}
    source = {name: passes.bank.source[name] for name in ("sequences", "tokens")}
    facts |= {"plan": decision.plan.to_json(), "source": source, "summed": passes.summed}
    saved.put(PLAN, facts=facts | {"said": "the plan"})
    one_pass = job.recipe.schedule == "one-pass" or job.judged is not None
    if not (one_pass if job.walk is None else job.shares.keep_sums):
        saved.drop(SUMS)  # which a walk alone doesn't need
    return decision
