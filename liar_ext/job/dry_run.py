"""A job that is only described, ``liar prune --dry-run``: what it would do, and what that takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from liar_ext.calibration.batches import FOLDS, Batches, read_batch, read_batches
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.stock_config import how_to_load
from liar_ext.job.estimate import GIB, bytes_of_states, in_gib, stages_of, tokens_of, work_of_token
from liar_ext.job.preparing import prepare
from liar_ext.job.state import Job
from liar_ext.models.configs import skeleton
from liar_ext.models.depth import count_blocks_kept, stack_of
from liar_ext.models.plan import Plan, SitePlan, sites_left
from liar_ext.models.registry import type_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.models.slicing import allowed_counts, apply_plan, site_step
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.hidden_size import count_kept
from liar_ext.reconstruction.solve import with_bias
from liar_ext.reconstruction.streams import Walk
from liar_ext.report.sections import latency_lines
from liar_ext.report.tables import Table, to_text
from liar_ext.selection.allocation import even_plan
from liar_ext.selection.expert_scales import POWERS, of_fold
from liar_ext.selection.whole_experts import count_experts_kept, layers_of

PLAIN = "loads with plain"


def describe(
    model: nn.Module, batches: Batches, recipe: Recipe, judge_on: Sequence | None = None
) -> list[str]:
    """Return lines on what :func:`liar_ext.prune` would do with these, and check that it can.

    Sizes, passes and loading are exact where they don't depend on what will be measured. Times are
    counted operations, at the rate of a forward pass over one batch.
    """
    job = prepare(Job(model, batches, recipe, judged=judge_on))
    recipe, at = job.recipe, job.sites(model)
    model_type = type_of(model)
    equal = even_plan(at, recipe.budget, job.costs(model), model_type=model_type)
    if job.speed is not None:
        job.speed.time(equal)
    speed = [] if job.speed is None else latency_lines(job.speed.facts())
    return [
        f"{type(model).__name__}: {count_params(model):,} parameters, of which "
        f"{sum(site.params for site in at):,} may be pruned",
        *to_text(_sizes(at, equal, recipe, model)),
        *(f"latency: {line}" for line in speed),
        *_costs(job, at),
        _loading(model, equal, recipe, at),
    ]


def describe_streamed(job: Job, store: BlockStore) -> list[str]:
    """Return lines on what a job would take, with one block in memory at a time."""
    job = prepare(replace(job, walk=Walk(store)))
    shares, layerwise = job.shares, job.recipe.schedule == "layerwise"
    tokens = sum(map(tokens_of, job.batches))
    held = bytes_of_states(job.model, sites(job.model), tokens, layerwise=layerwise)
    removing, solving = job.recipe.keep_experts != 1.0, job.recipe.prunes_sites
    if removing:  # beside the text, sequences that judge models pass the blocks by each way
        some = [each for fold in range(FOLDS) for each in of_fold(read_batches(job.batches), fold)]
        tokens += (2 + len(POWERS)) * sum(map(tokens_of, some))
        held = max(held, bytes_of_states(job.model, sites(job.model), tokens, layerwise=False))
    beyond, need = max(0, held - shares.states), sum(shares.need.values())
    size = sum(each.nbytes for each in store.model.parameters())
    again = "" if shares.keep_sums or layerwise else ", twice"
    return [
        f"{type(job.model).__name__}: {job.params['before']:,} parameters, "
        f"{size / GIB:.3g} GiB in {len(store)} blocks of at most "
        f"{store.block_bytes / GIB:.3g} GiB, read {'with' if store.prefetch else 'without'} "
        "reading ahead",
        f"memory: {need / GIB:.3g} of {job.limit / GIB:.3g} GiB without hidden states "
        f"(GiB: {in_gib(shares.need)})",
        f"hidden states: {held / GIB:.3g} GiB, of which {beyond / GIB:.3g} GiB lie "
        "in the output folder",
        f"weights: read {'three times' if removing and solving else 'twice'} and written once"
        + (f"; calibration text summed{again}" if solving else ""),
    ]


def _sizes(at: Sequence[Site], equal: Plan, recipe: Recipe, model: nn.Module) -> Table:
    chosen = "all the same" if recipe.uniform_layers else "each its own"
    free = f"kept by {recipe.allocation}, {chosen}" if recipe.allocation != "uniform" else ""
    heads = ("", "layers", "units of a layer", "kept by the same fraction", free)
    rows = [_layers(some, equal, recipe) for some in _alike(at, recipe)]
    if recipe.keep_blocks != 1.0:
        count = count_blocks_kept(model, recipe.keep_blocks)
        rows.append(("blocks", "", str(len(stack_of(model)[1])), str(count), ""))
    if recipe.keep_experts != 1.0:
        count, layers = count_experts_kept(model, recipe.keep_experts), layers_of(model)
        rows.append(("experts", str(len(layers)), str(layers[0].experts), str(count), ""))
    if recipe.keep_hidden != 1.0:
        hidden = hidden_of(model)
        count = count_kept(hidden, recipe.keep_hidden, recipe.tile)
        step = recipe.budget.step(hidden.size, hidden.multiple_of)
        rows.append(("hidden size", "", str(hidden.size), f"{count}, in steps of {step}", ""))
    return Table("Sizes", heads, rows, (0, 2, 4))


def _alike(at: Sequence[Site], recipe: Recipe) -> list[list[Site]]:
    """Return the sites in groups of one name and size, of which the first can stand for all."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sorted(at, key=lambda site: recipe.prunable_kinds.index(site.kind)):
        facts = _what(site), site.expert is None, site.experts, site.units, site.unit, site.d_in
        groups.setdefault(facts, []).append(site)
    return list(groups.values())


def _what(site: Site) -> str:
    """Return what a site's name says that it is: attn, cross attn, mlp, or the shared mlp."""
    parts = [part for part in site.name.split(".") if not part.isdecimal()]
    return parts[-1].replace("_", " ")


def _layers(some: Sequence[Site], equal: Plan, recipe: Recipe) -> tuple[str, ...]:
    kept = [len(equal.sites[site.name].kept) for site in some]
    site, counts, layers = some[0], allowed_counts(some[0], recipe.budget), teams_of(some)
    same = str(min(kept)) if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
    step = site_step(site, recipe.budget)
    steps = f"in steps of {step}" if len(counts) > 1 else "none can go"
    if recipe.allocation == "uniform":
        free = steps if step > 1 else ""
    else:
        free = f"{counts[0]} to {counts[-1]} {steps}"
    each = "" if site.expert is None else f"{len(layers[site.team])} experts of "
    units = f"{each}{site.units} {site.unit.replace('_', ' ')}s"
    return _what(site), str(len(layers)), units, same, free


def _costs(job: Job, at: Sequence[Site]) -> list[str]:
    rate = _rate(job, at)
    forward = sum(work_of_token(job.model, at)) * sum(map(tokens_of, job.batches)) / rate
    stages, count = stages_of(job, rate=rate), len(job.batches)
    rows = [
        (name, _time(each.seconds), f"{each.seconds / forward:.1f}", f"{each.bytes / GIB:.2f}")
        for name, each in stages.items()
    ]
    seconds = sum(each.seconds for each in stages.values())
    passes = {name: each.steps // count for name, each in stages.items()}
    more = f" and {passes['narrow']} to narrow the hidden size" if "narrow" in passes else ""
    weights = sum(each.numel() * each.element_size() for each in job.model.parameters())
    most = max((each.bytes for each in stages.values()), default=0)
    return [
        *to_text(Table("Cost", ("stage", "time", "forward passes", "GiB"), rows)),
        f"memory (GiB): {in_gib({'for weights': weights, 'beside them at most': most})}",
        f"passes over the calibration text: {passes.get('calibrate', 0)} to calibrate{more}",
        f"time: about {_time(seconds)}, {seconds / forward:.1f} times a forward pass over the "
        f"calibration text ({count} batches), as timed on one batch; loading, --eval and saving "
        "come on top",
    ]


@torch.no_grad()
def _rate(job: Job, at: Sequence[Site]) -> float:
    """Return the operations a second of a forward pass over one batch, timed at its second run."""
    batch = read_batch(job.batches[0]).to(device_of(job.model))
    with evaluating(job.model):
        for _ in range(2):
            start = time.perf_counter()
            job.model(**batch.inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    work = sum(work_of_token(job.model, at)) * tokens_of(batch)
    return work / (time.perf_counter() - start)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _loading(model: nn.Module, equal: Plan, recipe: Recipe, at: Sequence[Site]) -> str:
    """Return which loaders will take the result: by a plan of the kind that will come out."""
    plan = equal
    if not recipe.prunes_sites:
        plan = replace(plan, sites={})
    elif recipe.allocation != "uniform" and not recipe.uniform_layers:
        plan = _uneven(equal, at, recipe)
    if recipe.keep_experts != 1.0:
        count = count_experts_kept(model, recipe.keep_experts)
        experts = {site.team: SitePlan.first(site.experts, count) for site in layers_of(model)}
        gone = {f"{name}.{at}" for name, each in experts.items() for at in range(count, each.units)}
        left = {name: site for name, site in plan.sites.items() if name not in gone}
        plan = replace(plan, sites=left, experts=experts)
    if recipe.keep_blocks != 1.0:
        count = count_blocks_kept(model, recipe.keep_blocks)
        blocks = SitePlan.first(len(stack_of(model)[1]), count)
        left, experts = (sites_left(some, blocks) for some in (plan.sites, plan.experts))
        plan = replace(plan, sites=left, experts=experts, blocks=blocks)
    plan = with_bias(plan, model, recipe.reconstruct)
    if recipe.keep_hidden != 1.0:
        hidden = hidden_of(model)
        count = count_kept(hidden, recipe.keep_hidden, recipe.tile)
        plan = replace(plan, hidden=SitePlan.first(hidden.size, count))
    said = _how(model, plan)
    if not (recipe.uniform_layers and recipe.allocation != "uniform" and plan.sites):
        return f"loading: {said}"
    for kind in recipe.prunable_kinds:  # the allocation may leave the others whole
        names = {site.name for site in at if site.kind == kind}
        alone = {name: each for name, each in plan.sites.items() if name in names}
        less = _how(model, replace(plan, sites=alone))
        if alone and PLAIN in less and PLAIN not in said:
            return f"loading, if only {kind} sites lose units: {less} Otherwise: {said}"
    return f"loading, with the sizes of the same fraction everywhere: {said}"


def _how(model: nn.Module, plan: Plan) -> str:
    pruned = skeleton(type(model), model.config)
    apply_plan(pruned, plan)
    return how_to_load(pruned, plan)


def _uneven(plan: Plan, at: Sequence[Site], recipe: Recipe) -> Plan:
    """Return the plan with one size changed, where one can be: layers will come out unequal."""
    for team in teams_of(at).values():
        kept = plan.sites[team[0].name].kept
        for count in allowed_counts(team[0], recipe.budget):
            if count != len(kept):
                own = {s.name: SitePlan.first(s.units, count, s.groups) for s in team}
                return replace(plan, sites={**plan.sites, **own})
    return plan
