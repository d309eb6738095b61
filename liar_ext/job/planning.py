"""Plans of jobs: for several budgets from one calibration, and the dry run of one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import FOLDS, Batches, completed, kept_batches, read_batches
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.saved_sums import bytes_of_sums, check_memory
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.stock_config import how_to_load
from liar_ext.job.analysis import decide_anew, narrowed, passes_of
from liar_ext.job.estimate import (
    GIB,
    bars_of,
    bytes_of_states,
    in_gib,
    stages_of,
    tokens_of,
    work_of_token,
)
from liar_ext.job.preparing import changes_all, prepare
from liar_ext.job.pruning import run
from liar_ext.job.state import Job, Known
from liar_ext.measure.embeddings import Evaluator
from liar_ext.models.plan import Budget, Plan, SitePlan, sites_left
from liar_ext.models.recipe import Recipe
from liar_ext.models.registry import skeleton, type_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import device_of, evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.models.slicing import allowed_counts, apply_plan, site_step
from liar_ext.models.whole import count_blocks_kept, stack_of
from liar_ext.reconstruction.hidden_size import count_kept
from liar_ext.reconstruction.solve import with_bias
from liar_ext.reconstruction.streams import Walk
from liar_ext.report.report import Report
from liar_ext.report.sections import latency_lines
from liar_ext.report.tables import Table, measured, to_text
from liar_ext.selection.allocation import even_plan
from liar_ext.selection.costs import total_cost
from liar_ext.selection.expert_scales import POWERS, of_fold
from liar_ext.selection.whole_experts import count_experts_kept, layers_of
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.errors import InputError
from liar_ext.system.progress import showing_bars

PROBE_KEEP = 0.8  # of each site, the default budget's, while sensitivities are measured
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass
class Point:
    """The result for one budget of a sweep."""

    recipe: Recipe  # every choice
    plan: Plan
    predicted_divergence: float | None  # nats per token, for allocation curve
    params: int  # of the pruned model
    flops: float  # fraction of the dense model's operations over recipe.seq_len tokens
    seconds: float  # beyond what other budgets share
    time: float | None = None  # predicted fraction of the dense model's, for a budget of latency
    report: Report | None = None  # of the pruned model, where there is one

    def quality(self, of: str = "pruned") -> dict[str, float]:
        """Return the measured quality of the model, ``pruned`` or ``dense``."""
        return {} if self.report is None else measured(self.report.evaluation.get(of, {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, as JSON has them."""
        names = ("predicted_divergence", "params", "flops", "time", "seconds")
        numbers = {name: getattr(self, name) for name in names}
        return {"keep": self.recipe.keep, **numbers, **self.quality()}


@dataclass
class Sweep:
    """Prunes copies of one model by several recipes; what these share is computed once."""

    model: nn.Module
    batches: Batches | None = None  # the text of the bank if not given
    bank: MomentBank | None = None
    judge_on: Sequence[Mapping[str, Tensor]] | None = None  # as for prune()
    saved: Checkpoint | None = None  # of divergences for sensitivities: for plans by one recipe
    probe_keep: float | None = None  # of a site whose sensitivity is measured; None: the budget's
    known: Known = field(init=False)

    def __post_init__(self) -> None:
        self.batches = kept_batches(self.batches)
        if self.bank is None:
            check_memory("sweep", sum(bytes_of_sums(site.d_in) for site in sites(self.model)))
            self.bank = calibrate(self.model, self.batches)
        self.known = Known.of_bank(self.bank, self.probe_keep)

    def check(self, recipes: Iterable[Recipe]) -> None:
        """Raise InputError for whatever can't work, before anything long, such as timing."""
        for recipe in recipes:
            if recipe.of != "latency" or recipe.latency_table is not None:
                prepare(self._job(self.model, recipe))

    def plan(self, recipe: Recipe) -> Point:
        """Return the plan of a recipe; nothing is solved."""
        start = time.perf_counter()
        job = prepare(self._job(self.model, replace(recipe, schedule="one-pass")))
        base = narrowed(job)
        decision = decide_anew(job, passes_of(job, base))
        pruned = skeleton(type(self.model), self.model.config)
        plan = replace(decision.plan, **base.gone)
        apply_plan(pruned, plan)
        predicted = decision.facts.get("predicted_divergence")
        size, taken = self._size(pruned, recipe), time.perf_counter() - start
        speed = None if decision.speed is None else decision.speed.predicted
        return Point(recipe, plan, predicted, *size, taken, speed)

    def prune(self, recipe: Recipe) -> tuple[nn.Module, Point]:
        """Return a pruned copy of the model, and its numbers."""
        start = time.perf_counter()
        pruned = copy.deepcopy(self.model)
        report = run(replace(self._job(pruned, recipe), judged=self.judge_on))
        predicted = report.settings.get("predicted_divergence")
        given = report.recipe, report.plan, predicted, *self._size(pruned, recipe)
        speed = report.latency.get("predicted")
        return pruned, Point(*given, time.perf_counter() - start, speed, report)

    def _size(self, pruned: nn.Module, recipe: Recipe) -> tuple[int, float]:
        budget = Budget(1.0, "flops", seq_len=recipe.seq_len)
        costs = [total_cost(each, sites(each), budget) for each in (pruned, self.model)]
        return count_params(pruned), costs[0] / costs[1]

    def _job(self, model: nn.Module, recipe: Recipe) -> Job:
        if whole := changes_all(recipe):
            batches = self.bank.text if self.batches is None else self.batches
            if batches is None:
                raise InputError(f"sweep: {whole[0]} needs the calibration set; give batches")
            return Job(model, batches, recipe, known=Known(probe_keep=self.probe_keep))
        return Job(model, self.batches, recipe, self.bank, self.known, self.saved)


def sweep(
    model: nn.Module,
    batches: Batches | None = None,
    recipe: Recipe | None = None,
    *,
    keep: Sequence[float | Budget] = KEEP,
    bank: MomentBank | None = None,
    evaluate_on: Sequence[Mapping[str, Tensor]] | None = None,
    on_result: Callable[[nn.Module, Report], None] | None = None,
    progress: bool = False,
    **choices: object,
) -> list[Point]:
    """Decide what several budgets keep, from one calibration, and prune a copy for each if asked.

    Moments, scores, error curves and sensitivities, with 0.8 of each site left, are computed once.
    A bank spares the pass over the calibration text; one with sensitivities all forward passes::

        bank = MomentBank.load("moments.safetensors")
        for point in sweep(model, bank=bank, keep=(0.9, 0.8, 0.7)):
            print(point.recipe.keep, point.predicted_divergence, point.params)

    For ``keep=0.8``, or another ``allocation`` than ``curve``, :func:`liar_ext.prune` returns the
    same by ``point.recipe``. Else it measures sensitivities at the budget's own fraction, and its
    plan may be slightly different.

    Parameters
    ----------
    model : nn.Module
        The dense model; it stays as it is.
    batches, bank, progress
        As for :func:`liar_ext.prune`; one of the first two is needed.
    recipe : Recipe, optional
        Every other choice.
    keep : sequence of float or Budget
        The budgets.
    evaluate_on : sequence of mapping, optional
        As for :func:`liar_ext.prune`: each budget's model is made, and measured.
    on_result : callable, optional
        Called with each pruned copy, which it may keep, and its report. Without this and
        ``evaluate_on`` plans are made and nothing is solved.
    **choices
        Fields of the recipe that are other than in ``recipe``, or than by default.

    Returns
    -------
    list of Point
        In the order of ``keep``.

    Raises
    ------
    InputError
        If a choice, the model, the data or a budget cannot be used, before the first is decided.
    """
    start = Recipe.build(recipe, **choices)
    keep = list(keep) if isinstance(keep, Iterable) and not isinstance(keep, str) else [keep]
    recipes = [Recipe.build(start, keep=each) for each in keep]
    solves = on_result is not None or evaluate_on is not None
    points, dense, evaluator = [], None, Evaluator()
    evaluate_on = kept_batches(evaluate_on)
    with showing_bars(progress):
        work = Sweep(model, batches, bank, probe_keep=PROBE_KEEP)
        work.check(recipes if solves else [replace(r, schedule="one-pass") for r in recipes])
        for each in recipes:
            if not solves:
                points.append(work.plan(each))
                continue
            pruned, point = work.prune(each)
            if evaluate_on is not None:
                dense = dense or evaluator(model, evaluate_on)
                quality = evaluator(pruned, evaluate_on)
                point.report.evaluation |= {"dense": dense, "pruned": quality}
            if on_result is not None:
                on_result(pruned, point.report)
            points.append(point)
            del pruned
    return points


def describe(
    model: nn.Module, batches: Batches, recipe: Recipe, judge_on: Sequence | None = None
) -> list[str]:
    """Return lines on what :func:`liar_ext.prune` would do with these, and check that it can."""
    job = prepare(Job(model, batches, recipe, judged=judge_on))
    recipe, at = job.recipe, job.sites(model)
    equal = even_plan(at, recipe.budget, job.costs(model), model_type=type_of(model))
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
    """Return lines on what a job with one block in memory at a time takes."""
    job = prepare(replace(job, walk=Walk(store)))
    shares, layerwise = job.shares, job.recipe.schedule == "layerwise"
    removing, solving = job.recipe.keep_experts != 1.0, job.recipe.prunes_sites
    tokens, at = sum(map(tokens_of, job.batches)), sites(job.model)
    held = bytes_of_states(job.model, at, tokens, layerwise=layerwise)
    if removing:  # beside the text, sequences that judge models pass the blocks by each way
        some = [each for fold in range(FOLDS) for each in of_fold(read_batches(job.batches), fold)]
        tokens += (2 + len(POWERS)) * sum(map(tokens_of, some))
        held = max(held, bytes_of_states(job.model, at, tokens, layerwise=False))
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
    alike: dict[tuple[object, ...], list[Site]] = {}  # of which the first stands for all
    for site in sorted(at, key=lambda site: recipe.prunable_kinds.index(site.kind)):
        *_, what = (part for part in site.name.split(".") if not part.isdecimal())
        facts = what, site.expert is None, site.experts, site.units, site.unit, site.d_in
        alike.setdefault(facts, []).append(site)
    rows = [_layers(facts[0], some, equal, recipe) for facts, some in alike.items()]
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


def _layers(what: str, some: Sequence[Site], equal: Plan, recipe: Recipe) -> tuple[str, ...]:
    """Return the row of sites of one kind and size."""
    kept = [len(equal.sites[site.name].kept) for site in some]
    site, counts, layers = some[0], allowed_counts(some[0], recipe.budget), teams_of(some)
    same = str(min(kept)) if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
    step = site_step(site, recipe.budget)
    free = f"in steps of {step}" if len(counts) > 1 else "none can go"
    if recipe.allocation != "uniform":
        free = f"{counts[0]} to {counts[-1]} {free}"
    elif step == 1:
        free = ""
    each = "" if site.expert is None else f"{len(layers[site.team])} experts of "
    units = f"{each}{site.units} {site.unit.replace('_', ' ')}s"
    return what.replace("_", " "), str(len(layers)), units, same, free


def _costs(job: Job, at: Sequence[Site]) -> list[str]:
    rate, count = _rate(job, at), len(job.batches)
    forward = sum(work_of_token(job.model, at)) * sum(map(tokens_of, job.batches)) / rate
    stages = stages_of(bars_of(job, rate))

    def said(seconds: float) -> str:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

    rows = [
        (name, said(each.seconds), f"{each.seconds / forward:.1f}", f"{each.bytes / GIB:.2f}")
        for name, each in stages.items()
    ]
    seconds = sum(each.seconds for each in stages.values())
    passes = {name: each.steps // count for name, each in stages.items()}
    more = f" and {passes['narrow']} to narrow the hidden size" if "narrow" in passes else ""
    weights = sum(each.nbytes for each in job.model.parameters())
    most = max((each.bytes for each in stages.values()), default=0)
    return [
        *to_text(Table("Cost", ("stage", "time", "forward passes", "GiB"), rows)),
        f"memory (GiB): {in_gib({'for weights': weights, 'beside them at most': most})}",
        f"passes over the calibration text: {passes.get('calibrate', 0)} to calibrate{more}",
        f"time: about {said(seconds)}, {seconds / forward:.1f} times a forward pass over the "
        f"calibration text ({count} batches), as timed on one batch; loading, --eval and saving "
        "come on top",
    ]


@torch.no_grad()
def _rate(job: Job, at: Sequence[Site]) -> float:
    """Return the operations a second of a forward pass over one batch, timed at its second run."""
    batch = completed(job.model, next(read_batches(job.batches))).to(device_of(job.model))
    with evaluating(job.model):
        for _ in range(2):
            start = time.perf_counter()
            job.model(**batch.inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    work = sum(work_of_token(job.model, at)) * tokens_of(batch)
    return work / (time.perf_counter() - start)


def _loading(model: nn.Module, equal: Plan, recipe: Recipe, at: Sequence[Site]) -> str:
    """Return which loaders will take the result: by a plan of the kind that will come out."""
    plan, own = equal, recipe.allocation != "uniform"
    if not recipe.prunes_sites:
        plan = replace(plan, sites={})
    elif own and not recipe.uniform_layers:
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
    pruned = skeleton(type(model), model.config)
    apply_plan(pruned, plan)
    same = ", with the sizes of the same fraction everywhere" * bool(recipe.uniform_layers and own)
    return f"loading{same if plan.sites else ''}: {how_to_load(pruned, plan)}"


def _uneven(plan: Plan, at: Sequence[Site], recipe: Recipe) -> Plan:
    """Return the plan with one size changed, where one can be: layers will come out unequal."""
    for team in teams_of(at).values():
        kept = plan.sites[team[0].name].kept
        for count in allowed_counts(team[0], recipe.budget):
            if count != len(kept):
                own = {s.name: SitePlan.first(s.units, count, s.groups) for s in team}
                return replace(plan, sites={**plan.sites, **own})
    return plan
