"""``liar prune --dry-run``: what a job would do, before anything long."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from liar_ext.calibration.collect import collect_at
from liar_ext.calibration.memory import bytes_of_sums
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.passes import group_sites, room_for_sums, split
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.checkpoint.stock_config import how_to_load
from liar_ext.data.batches import FACTS, probe_batches
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, skeleton, teams_of
from liar_ext.narrowing.narrowing import count_kept
from liar_ext.pipeline.job import Job
from liar_ext.plan import Plan, SitePlan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.one_pass import reconstruct, with_bias
from liar_ext.report.tables import latency_lines
from liar_ext.selection.allocation import allowed_counts, even_plan, site_step
from liar_ext.selection.criteria import get_criterion
from liar_ext.selection.error_curves import error_curves
from liar_ext.selection.whole_experts import count_experts_kept, layers_of
from liar_ext.surgery.units import apply_plan

Batches = Sequence[Mapping[str, Tensor]]
# Of a layerwise walk: what prune's documentation says of its runs of the model.
LAYERWISE_RUNS = 4
# Of a backward pass with its forward, in forward passes.
BACKWARD_RUNS = 3
GIB = 2**30
PLAIN = "loads with plain"


def describe(model: nn.Module, batches: Batches, recipe: Recipe) -> list[str]:
    """Return lines on what :func:`liar_ext.prune` would do with these, and check that it can.

    Sizes, memory, passes and loading are exact where they don't depend on what will be measured;
    minutes are extrapolated from one batch of each fold, and one layer of each kind.

    Raises
    ------
    InputError
        Whatever the job would raise before it starts.
    """
    job = Job(model, batches, recipe)
    job.check()
    recipe = job.recipe
    at = job.sites(model)
    model_type = model.config.model_type
    equal = even_plan(at, recipe.budget, job.costs(model), model_type=model_type)
    if job.speed is not None:
        job.speed.time(equal)
    return [
        f"{type(model).__name__}: {count_params(model):,} parameters, of which "
        f"{sum(site.params for site in at):,} may be pruned",
        *_sizes(at, equal, recipe, model),
        *(
            []
            if job.speed is None
            else (f"latency: {line}" for line in latency_lines(job.speed.facts()))
        ),
        *_memory(model, at, recipe),
        _time(model, batches, at, equal, recipe),
        _loading(model, equal, recipe, at),
    ]


def _sizes(at: Sequence[Site], equal: Plan, recipe: Recipe, model: nn.Module) -> list[str]:
    """Return what layers can keep."""
    lines = [_layers(some, equal, recipe) for some in _alike(at, recipe)]
    if recipe.keep_experts != 1.0:
        count, layers = count_experts_kept(model, recipe.keep_experts), layers_of(model)
        lines.append(f"experts: {count} of {layers[0].experts} in each of {len(layers)} layers")
    if recipe.keep_hidden != 1.0:
        hidden = hidden_of(model)
        count = count_kept(hidden, recipe.keep_hidden, recipe.tile)
        step = recipe.budget.step(hidden.size, hidden.multiple_of)
        lines.append(f"hidden size: {count} of {hidden.size} features, in steps of {step}")
    return lines


def _alike(at: Sequence[Site], recipe: Recipe) -> list[list[Site]]:
    """Return the sites in groups of one name and size: experts, and what is shared, by themselves.

    The first of a group can stand for all of it.
    """
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sorted(at, key=lambda site: recipe.prunable_kinds.index(site.kind)):
        facts = _what(site), site.expert is None, site.experts, site.units, site.unit, site.d_in
        groups.setdefault(facts, []).append(site)
    return list(groups.values())


def _what(site: Site) -> str:
    """Return what a site's name says that it is: attn, cross attn, mlp, or the shared mlp."""
    parts = [part for part in site.name.split(".") if not part.isdecimal()]
    return parts[-1].replace("_", " ")


def _layers(some: Sequence[Site], equal: Plan, recipe: Recipe) -> str:
    """Return what the layers can keep whose sites these are, all of one size."""
    kept = [len(equal.sites[site.name].kept) for site in some]
    site, counts = some[0], allowed_counts(some[0], recipe.budget)
    same = str(min(kept)) if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
    step = site_step(site, recipe.budget)
    steps = f" in steps of {step}" if len(counts) > 1 else ": none can go"
    free = steps if step > 1 else ""
    if recipe.allocation != "uniform":
        whose = "all layers the same number" if recipe.uniform_layers else "each its own number"
        free = f"; {recipe.allocation} gives {whose}, {counts[0]} to {counts[-1]}{steps}"
    layers = teams_of(some)
    each = "" if site.expert is None else f"{len(layers[site.team])} experts of "
    return (
        f"{_what(site)}: {len(layers)} layer{'s' * (len(layers) > 1)} of {each}{site.units} "
        f"{site.unit.replace('_', ' ')}s; the same fraction everywhere would keep {same}{free}"
    )


def _memory(model: nn.Module, at: Sequence[Site], recipe: Recipe) -> list[str]:
    """Return what sums over the text take, and in how many passes."""
    room = room_for_sums(model, recipe.memory)
    needed = sum(bytes_of_sums(site.d_in) for site in at)
    held = max(sum(bytes_of_sums(site.d_in) for site in group) for group in group_sites(at, room))
    passes = _passes(group_sites(at, room), recipe)
    lines = []
    if passes:
        lines.append(
            f"memory: {_size(needed)} of activation statistics, at most {_size(held)} of it at a "
            f"time; the weights take {_size(_weights(model))}"
        )
    more = ""
    if recipe.keep_hidden != 1.0:
        more = f" and {_narrow_passes(model, recipe)} to narrow the hidden size"
    return [*lines, f"passes over the calibration text: {passes} to calibrate{more}"]


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _weights(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


def _passes(groups: Sequence[Sequence[Site]], recipe: Recipe) -> int:
    """Return the passes that calibration takes."""
    if recipe.keep == 1.0 and (recipe.keep_hidden != 1.0 or recipe.keep_experts != 1.0):
        return 0
    return len(groups) if recipe.schedule == "layerwise" else 2 * len(groups) - 1


def _narrow_passes(model: nn.Module, recipe: Recipe) -> int:
    hidden = hidden_of(model)
    count = count_kept(hidden, recipe.keep_hidden, recipe.tile)
    room = room_for_sums(model, recipe.memory)
    sizes = [bytes_of_sums(count + hidden.size)] * len(hidden.sources)
    return 1 + len(split(hidden.sources, sizes, room))


def _time(
    model: nn.Module, batches: Batches, at: Sequence[Site], equal: Plan, recipe: Recipe
) -> str:
    """Return an estimate of the minutes that the job takes, saving and evaluation aside."""
    pair = [batches[0], batches[-1]]  # one of each fold
    forward = _seconds(lambda: _run(model, pair)) / 2
    groups = group_sites(at, room_for_sums(model, recipe.memory))
    banks: list[MomentBank] = []
    hooked = _seconds(lambda: banks.append(collect_at(model, pair, groups[0]))) / 2
    runs = float(_passes(groups, recipe)) * hooked
    if recipe.keep_hidden != 1.0:
        runs += _narrow_passes(model, recipe) * 2 * hooked
    runs += forward * LAYERWISE_RUNS * (recipe.schedule == "layerwise")
    runs += forward * BACKWARD_RUNS * (get_criterion(recipe.criterion).needs == "gradient")
    solves = _solving(model, banks[0], groups[0], at, equal, recipe) * (_passes(groups, recipe) > 0)
    probes = 0.0
    if recipe.allocation == "curve" or recipe.rescale:
        share = sum(map(_size_of, probe_batches(batches))) / _size_of(batches[0])
        # Of one site half of the blocks are run again.
        every = (recipe.allocation == "curve") + recipe.rescale
        probes = every * len(at) / 2 * share * forward
    seconds = runs * len(batches) + solves + probes
    shown = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    relative = seconds / max(forward * len(batches), 1e-9)
    return (
        f"time: about {shown}, {relative:.1f} times a forward pass over the calibration text "
        f"({len(batches)} batches), as timed on one batch; loading, --eval and saving come on top"
    )


def _solving(
    model: nn.Module,
    bank: MomentBank,
    group: Sequence[Site],
    at: Sequence[Site],
    equal: Plan,
    recipe: Recipe,
) -> float:
    """Return the seconds of all solves and error curves, from one site of each kind and size."""
    seconds, curve = 0.0, recipe.allocation == "curve"
    here = {site.name for site in group}
    for some in _alike(at, recipe):
        site = next((site for site in some if site.name in here), None)
        if site is None:
            continue
        plan = replace(equal, sites={site.name: equal.sites[site.name]})
        plan = with_bias(plan, model, recipe.reconstruct)
        scores = {site.name: torch.arange(site.units, 0, -1.0)}
        solve = _seconds(lambda plan=plan: reconstruct(model, bank, plan, mode=recipe.reconstruct))
        each = solve * (1 + curve)
        if curve:
            one = [site]
            each += _seconds(lambda one=one, s=scores: error_curves(model, bank, one, s))
        seconds += each * len(some)
    return seconds


@torch.no_grad()
def _run(model: nn.Module, batches: Batches) -> None:
    with evaluating(model):
        for batch in batches:
            device = next(model.parameters()).device
            model(**{key: value.to(device) for key, value in batch.items() if key not in FACTS})


def _size_of(batch: Mapping[str, Tensor]) -> int:
    """Return the tokens of a batch, or the sequences of one that has none."""
    ids = batch.get("input_ids")
    return len(next(iter(batch.values()))) if ids is None else ids.numel()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _loading(model: nn.Module, equal: Plan, recipe: Recipe, at: Sequence[Site]) -> str:
    """Return which loaders will take the result: by a plan of the kind that will come out."""
    plan = equal
    if recipe.keep == 1.0 and (recipe.keep_hidden != 1.0 or recipe.keep_experts != 1.0):
        plan = replace(plan, sites={})
    elif recipe.allocation != "uniform" and not recipe.uniform_layers:
        plan = _uneven(equal, at, recipe)
    if recipe.keep_experts != 1.0:
        plan = _fewer_experts(plan, model, recipe)
    plan = with_bias(plan, model, recipe.reconstruct)
    if recipe.keep_hidden != 1.0:
        hidden = hidden_of(model)
        count = count_kept(hidden, recipe.keep_hidden, recipe.tile)
        plan = replace(plan, hidden=SitePlan(hidden.size, tuple(range(count))))
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
    """Return which loaders take the model after a plan."""
    pruned = skeleton(type(model), model.config)
    apply_plan(pruned, plan)
    return how_to_load(pruned, plan)


def _fewer_experts(plan: Plan, model: nn.Module, recipe: Recipe) -> Plan:
    """Return the plan with the first experts of each layer alone."""
    count = count_experts_kept(model, recipe.keep_experts)
    experts = {site.team: SitePlan(site.experts, tuple(range(count))) for site in layers_of(model)}
    gone = {
        f"{layer}.{expert}" for layer in experts for expert in range(count, experts[layer].units)
    }
    left = {name: site for name, site in plan.sites.items() if name not in gone}
    return replace(plan, sites=left, experts=experts)


def _uneven(plan: Plan, at: Sequence[Site], recipe: Recipe) -> Plan:
    """Return the plan with one size changed, where one can be: layers will come out unequal."""
    for team in teams_of(at).values():
        kept = plan.sites[team[0].name].kept
        for count in allowed_counts(team[0], recipe.budget):
            if count != len(kept):
                own = {s.name: SitePlan(s.units, _first(s, count)) for s in team}
                return replace(plan, sites={**plan.sites, **own})
    return plan


def _first(site: Site, count: int) -> tuple[int, ...]:
    """Return the first units of every group of a site."""
    run, each = site.units // site.groups, count // site.groups
    return tuple(group * run + unit for group in range(site.groups) for unit in range(each))
