"""Several budgets at once: what they have in common is computed once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import Batches, check_batches, kept_batches
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.saved_sums import bytes_of_sums, check_memory
from liar_ext.checkpoint.folder import count_params
from liar_ext.job.analysis import decide_anew, narrowed, passes_of
from liar_ext.job.preparing import changes_all, prepare, why_textless
from liar_ext.job.pruning import run
from liar_ext.job.state import Job, Known
from liar_ext.measure.embeddings import Evaluator
from liar_ext.models.configs import skeleton
from liar_ext.models.plan import Budget, Plan
from liar_ext.models.sites import sites
from liar_ext.models.slicing import apply_plan
from liar_ext.recipe import Recipe
from liar_ext.report.report import Report
from liar_ext.report.tables import measured
from liar_ext.selection.costs import total_cost
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.errors import InputError
from liar_ext.system.progress import showing_bars

# At this fraction of each site, the default budget's, sensitivities are measured for all budgets.
PROBE_KEEP = 0.8
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass
class Point:
    """What one budget of a sweep gives."""

    recipe: Recipe  # every choice
    plan: Plan
    predicted_divergence: float | None  # nats per token, for allocation curve
    params: int  # of the pruned model
    flops: float  # fraction of the dense model's operations over recipe.seq_len tokens
    seconds: float  # beyond what other budgets share
    time: float | None = None  # predicted fraction of the dense model's, for a budget of latency
    report: Report | None = None  # of the pruned model, where there is one

    def quality(self, of: str = "pruned") -> dict[str, float]:
        """Return what was measured of the model, ``pruned`` or ``dense``; empty without text."""
        return {} if self.report is None else measured(self.report.evaluation.get(of, {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, as JSON has them."""
        names = ("predicted_divergence", "params", "flops", "time", "seconds")
        numbers = {name: getattr(self, name) for name in names}
        return {"keep": self.recipe.keep, **numbers, **self.quality()}


@dataclass
class Sweep:
    """Prunes copies of one model by several recipes, which share what they have in common.

    Moments are taken from a bank, or summed once; scores, error curves and sensitivities are
    computed once for all recipes that would compute the same. The model stays as it is.
    """

    model: nn.Module
    batches: Batches | None = None  # the text of the bank if not given
    bank: MomentBank | None = None
    judge_on: Sequence[Mapping[str, Tensor]] | None = None  # as for prune()
    saved: Checkpoint | None = None  # of divergences for sensitivities: for plans by one recipe
    probe_keep: float | None = None  # of a site whose sensitivity is measured; None: the budget's
    known: Known = field(init=False)

    def __post_init__(self) -> None:
        if self.batches is not None:
            check_batches(self.batches)
            self.batches = list(self.batches)
        if self.bank is None:
            if self.batches is None:
                raise InputError("sweep: needs batches or a bank, got neither; give one of them")
            check_memory("sweep", sum(bytes_of_sums(site.d_in) for site in sites(self.model)))
            self.bank = calibrate(self.model, self.batches)
        self.known = Known.of_bank(self.bank, self.probe_keep)

    def check(self, recipes: Iterable[Recipe]) -> None:
        """Raise InputError for whatever can't work, before anything long, such as timing."""
        for recipe in recipes:
            if recipe.of != "latency" or recipe.latency_table is not None:
                prepare(self._job(self.model, recipe))

    def plan(self, recipe: Recipe) -> Point:
        """Return what a recipe decides; nothing is solved."""
        start = time.perf_counter()
        job = prepare(self._job(self.model, _decided(recipe)))
        base = narrowed(job)
        decision = decide_anew(job, passes_of(job, base))
        plan, pruned = base.in_full(decision.plan), skeleton(type(self.model), self.model.config)
        apply_plan(pruned, plan)
        predicted = decision.facts.get("predicted_divergence")
        size, taken = self._size(pruned, recipe), time.perf_counter() - start
        speed = None if decision.speed is None else decision.speed.predicted
        return Point(recipe, plan, predicted, *size, taken, speed)

    def prune(self, recipe: Recipe) -> tuple[nn.Module, Point]:
        """Return a pruned copy of the model, and what it is."""
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
        if changes_all(recipe):
            batches = self.bank.text if self.batches is None else self.batches
            if batches is None:
                missing, otherwise = why_textless(model)
                raise InputError(
                    "sweep: keep_hidden, keep_blocks and keep_experts take moments of their own "
                    f"over {missing}; {otherwise}leave them out"
                )
            known = Known(probe_keep=self.probe_keep)
            return Job(model, batches, recipe, known=known)
        given = model, self.batches, recipe, self.bank, self.known
        return Job(*given, saved=self.saved)


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
    With a bank there is no pass over the calibration text; with one that has the sensitivities, no
    forward pass at all::

        bank = MomentBank.load("moments.safetensors")
        for point in sweep(model, bank=bank, keep=(0.9, 0.8, 0.7)):
            print(point.recipe.keep, point.predicted_divergence, point.params)

    Of ``keep=0.8``, and where ``allocation`` is not ``curve``, each result is what
    :func:`liar_ext.prune` gives by ``point.recipe``. For other budgets ``prune`` measures
    sensitivities at the budget's own fraction, and its plan may be slightly different.

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
    if not keep:
        raise InputError("sweep: needs at least one budget, got none; give keep=[0.9, 0.8], say")
    budgets = (asdict(each) if isinstance(each, Budget) else {"keep": each} for each in keep)
    recipes = [replace(start, **each) for each in budgets]
    solves = on_result is not None or evaluate_on is not None
    points, dense, evaluator = [], None, Evaluator()
    evaluate_on = kept_batches(evaluate_on)
    with showing_bars(progress):
        work = Sweep(model, batches, bank, probe_keep=PROBE_KEEP)
        work.check(recipes if solves else map(_decided, recipes))
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


def _decided(recipe: Recipe) -> Recipe:
    """Return a recipe that decides the same and solves nothing that runs the model."""
    return replace(recipe, schedule="one-pass")
