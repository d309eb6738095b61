"""The state of a job: what it is asked for, what is known already, and where its result goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import Batches, read_batch
from liar_ext.checkpoint.folder import fixed_inputs
from liar_ext.checkpoint.saving import Shards, fill_folder
from liar_ext.measure.latency import measure_latency, plan_of, ratios, sliced, where
from liar_ext.measure.latency_table import LatencyTable
from liar_ext.measure.speed import Quartiles
from liar_ext.models.plan import Budget, Plan
from liar_ext.models.sites import Site, get_consumer_bias, sites
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields
from liar_ext.reconstruction.ridge import form_at
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.report.report import Report
from liar_ext.selection.allocation import check_budget, even_plan
from liar_ext.selection.costs import Costs, total_cost
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.distributed import is_first
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Clock, hiding_bars

SENSITIVITY = "sensitivity"
# A plan may miss what its sites add up to by this fraction of the dense seconds.
TOLERANCE = 0.01
# A correction by more than this factor at a time is no error of a sum, but a machine that is busy.
MOST_CORRECTED = 1.5
MOST_ROUNDS = 2
PLACE = ("device", "dtype", "threads", "cpu", "gpu")  # what seconds are of
MISSED = 0.03  # what a warning tells of, by the dense seconds
NOISY = 0.05  # likewise, of their own spread
Value = TypeVar("Value")


@dataclass
class Known:
    """What has been found for one dense model, its moments and their text.

    ``found`` has values by what they are, key and site. ``probe_keep`` is the fraction of a site
    that stays while its sensitivity is measured; None: the budget's.
    """

    found: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    probe_keep: float | None = None

    @classmethod
    def of_bank(cls, bank: MomentBank | None, probe_keep: float | None = None) -> Known:
        """Return the sensitivities that a bank has."""
        if not isinstance(bank, MomentBank | None):
            raise InputError(
                f"bank: must be a MomentBank, got {type(bank).__name__}; MomentBank.load reads one"
            )
        known = cls(probe_keep=probe_keep)
        for each in [] if bank is None else bank.source.get("sensitivities", ()):
            for name, value in each["sites"].items():
                known.found[SENSITIVITY, each["key"], name] = value
        return known

    def get(
        self,
        what: str,
        key: str,
        at: Sequence[Site],
        compute: Callable[[Sequence[Site]], Mapping[str, Value]],
    ) -> dict[str, Value]:
        """Return the values of sites by name; ``compute`` gives those that aren't there."""
        missing = [site for site in at if not self.has(what, key, [site])]
        values = compute(missing) if missing else {}
        self.found |= {(what, key, _place(site)): values[site.name] for site in missing}
        return {site.name: self.found[what, key, _place(site)] for site in at}

    def has(self, what: str, key: str, at: Sequence[Site]) -> bool:
        """Tell whether the values of all sites are there."""
        return all((what, key, _place(site)) in self.found for site in at)

    def store_sensitivities(self, bank: MomentBank) -> None:
        """Put the sensitivities that were measured into a bank, for jobs to come."""
        by_key: dict[str, dict[str, float]] = {}
        for (what, key, name), value in self.found.items():
            if what == SENSITIVITY:
                by_key.setdefault(key, {})[name] = value
        bank.source["sensitivities"] = [{"key": k, "sites": own} for k, own in by_key.items()]


def _place(site: Site) -> str:
    """Return what a value is of: a site with its units."""
    return f"{site.name} {site.unit} {site.units} {site.groups}"


def per(recipe: Recipe) -> str:
    """Return what scores are of: features where weights are compared across layers."""
    return "feature" if recipe.allocation == "global" else "unit"


def score_key(recipe: Recipe, **more: object) -> str:
    """Return what scores and error curves depend on, beside the site."""
    chosen = {each.name: getattr(recipe, each.name) for each in recipe_fields(affects="scores")}
    facts = {**chosen, "per": per(recipe), "liar_ext": version("liar_ext"), **more}
    return json.dumps(facts, sort_keys=True)


def sensitivity_key(recipe: Recipe, known: Known, model: nn.Module, at: Sequence[Site]) -> str:
    """Return what sensitivities depend on, beside the site: also the form of the new weights."""
    forms = {get_consumer_bias(model, site) is not None for site in at}
    mode = recipe.reconstruct
    form = form_at(mode, *forms) if len(forms) == 1 else mode
    return score_key(recipe, keep=known.probe_keep or recipe.keep, form=form)


@dataclass(frozen=True)
class Shares:
    """What the memory of a job is for, in bytes."""

    need: dict[str, int]  # the peak without hidden states, by its parts
    shard: int  # of what is written at a time
    states: int  # hidden states in memory; what is more lies in a file
    keep_sums: bool  # whether the sums of all blocks are held


class Speed:
    """What the sites of a model cost in seconds, and how that fits the plans made by it.

    A ``table`` that was measured before, here or elsewhere, is taken as it is, so that the plan
    comes out again. Without one the sites are measured.
    """

    def __init__(
        self,
        model: nn.Module,
        at: Sequence[Site],
        budget: Budget,
        table: LatencyTable | None = None,
    ) -> None:
        self.model, self.at, self.budget = model, list(at), budget
        self.given = table is not None
        if table is None:
            table = measure_latency(model, budget, at)
        table.check(budget)
        self.table = table
        here = where(model)
        # What was measured elsewhere can't be compared with seconds of this machine.
        self.is_here = all(table.where.get(key) == here.get(key) for key in PLACE)
        self.timed: dict[str, int] | None = None
        self.predicted = 1.0
        self.measured: Quartiles | None = None  # a plan's seconds by the dense ones

    @property
    def costs(self) -> Costs:
        """Seconds of every site by count, and of the dense model."""
        return Costs.measured(self.table, self.at)

    def settle(self, allocate: Callable[[Costs], Plan]) -> Costs:
        """Return costs that are corrected until they say what a plan made by them takes.

        A correction by which no plan meets the budget any more isn't taken; a warning tells.
        """
        for _ in range(MOST_ROUNDS):
            before = self.table
            if not self.fit(allocate(self.costs)):
                break
            try:
                allocate(self.costs)
            except InputError:
                self.table = before
                break
        return self.costs

    def fit(self, plan: Plan) -> bool:
        """Time a plan; correct the costs if they say another time, and tell whether they did.

        ``scale ← scale · (1 − measured) / (1 − predicted)``, both by the dense seconds, where they
        differ by more than ``TOLERANCE``. A table that was given stays as it is.
        """
        self.time(plan)
        expected = 1.0 - self.predicted
        if self.given or self.measured is None or expected <= TOLERANCE:
            return False
        saved = 1.0 - self.measured.median
        if abs(saved - expected) <= TOLERANCE:
            return False
        factor = min(max(saved / expected, 1 / MOST_CORRECTED), MOST_CORRECTED)
        self.table = replace(self.table, scale=self.table.scale * factor)
        return True

    def time(self, plan: Plan) -> None:
        """Time a plan beside the dense model, unless it was the last one.

        Where the table is of another machine, seconds of this one say nothing.
        """
        counts = {site.name: len(plan.sites[site.name].kept) for site in self.at}
        self.predicted = self.costs.kept_fraction(plan)
        if counts == self.timed or not self.is_here:
            return
        models = {"pruned": sliced(self.model, plan_of(self.model, self.at, counts))}
        models["dense"] = self.model
        self.measured = ratios(models, self.budget)["pruned"]
        self.timed = counts

    def facts(self) -> dict[str, object]:
        """Return what a report keeps: fractions of the dense seconds, and the table."""
        return {
            "dense_seconds": self.table.total,
            "predicted": self.predicted,
            "measured": None if self.measured is None else asdict(self.measured),
            "table": self.table.to_dict(),
        }

    def warnings(self) -> list[str]:
        """Return what a user has to know of the speed."""
        found, noise = [], self.table.spread / self.table.total
        if noise > NOISY:
            found.append(
                f"The time of the dense model varied by {noise:.0%} of it (half of the distance "
                "between quartiles): measure again on a machine that does nothing else."
            )
        if self.measured is not None and self.measured.median > self.budget.keep + MISSED:
            found.append(
                f"The plan takes {self.measured.median:.3g} of the dense time, where "
                f"{self.budget.keep:.3g} was asked for: give a lower keep, or measure again on a "
                "machine that does nothing else."
            )
        return found


class Folder:
    """The folder that blocks of a walk go to as they are solved, written by the first rank.

    ``begin`` returns the path to write to. ``fixed`` is the input that the folder is verified by.
    """

    def __init__(self, walk: Walk, begin: Callable[[], Path]) -> None:
        dtype, inputs = walk.model.dtype, fixed_inputs(walk.model)
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        fixed = [read_batch(given)] if is_first() else []
        self.walk, self.fixed = walk, StreamedBatches("fingerprint", walk, fixed)
        self.begin, self.shards = begin, None

    def add(self, index: int | None, size: int) -> None:
        """Write a block, or what lies outside of the blocks, in shards of ``size`` bytes."""
        if not is_first():
            return
        if self.shards is None:
            self.path = self.begin()
            self.shards = Shards(self.walk.model, self.path, size)
        with self.walk.source.head() if index is None else nullcontext():
            self.shards.add(self.walk.source.tensors(index))

    def complete(self, model: nn.Module, report: Report, tokenizer: Any) -> None:
        """Write all else that a folder has."""
        given = {"report": report, "tokenizer": tokenizer, "shards": self.shards}
        fill_folder(model, self.path, report.plan, running=self.fixed.answering(), **given)


@dataclass(frozen=True)
class Job:
    """One run of :func:`liar_ext.prune`, as it is asked for, or as :func:`prepare` returns it."""

    model: nn.Module
    batches: Batches | None
    recipe: Recipe
    bank: MomentBank | None = None
    known: Known | None = None  # what other jobs have found, of the same model, bank and text
    saved: Checkpoint | None = None  # where it keeps what is done
    judged: Batches | None = None  # text that decides the schedule, and nothing else
    evaluate_on: Batches | None = None
    certify_on: Batches | None = None
    walk: Walk | None = None  # with one block at a time; the model is in memory without it
    limit: int = 0  # bytes that the process may take, with a walk
    out: Folder | None = None  # where the blocks go, with a walk
    clock: Clock = field(default_factory=Clock)
    # Found by prepare().
    asked: Recipe | None = None  # the recipe before it was resolved
    notes: Sequence[str] = ()  # what to know of how the job is done
    earlier: Sequence[dict[str, object]] = ()  # jobs before this one
    params: Mapping[str, int] = field(default_factory=dict)  # of the dense model
    room: int = 0  # bytes that sums may take at a time
    speed: Speed | None = None  # for a budget of latency
    shares: Shares | None = None  # of the limit

    @property
    def narrows(self) -> bool:
        """Whether the hidden size is pruned."""
        return self.recipe.keep_hidden != 1.0

    def bars(self) -> AbstractContextManager:
        """Let stages show bars of their own, unless they are in a walk, whose steps are blocks."""
        return nullcontext() if self.walk is None else hiding_bars()

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites that may be pruned."""
        return sites(model, self.recipe.prunable_kinds, self.recipe.attn_unit)

    def timed(self, model: nn.Module) -> Speed | None:
        """Return what the sites of a model take in seconds, if latency is what is counted."""
        at, budget = self.sites(model), self.recipe.budget
        if budget.of != "latency" or (self.speed is not None and self.speed.model is model):
            return self.speed
        with self.clock("time"):
            given = self.recipe.latency_table
            table = None if given is None else LatencyTable.load(given)
            if table is not None and self.recipe.keep_blocks == 1.0:  # else it may be of fewer
                table.check_sites(at, sites(model, attn_unit=self.recipe.attn_unit))
            speed = Speed(model, at, budget, table)
            check_budget(at, budget, costs=speed.costs)
            if budget.keep < 1.0 and not speed.given:
                speed.fit(even_plan(at, budget, speed.costs))
        return speed

    def costs(self, model: nn.Module) -> Costs:
        """Return what the sites cost in the budget's unit."""
        if self.recipe.of == "latency":
            return self.timed(model).costs
        at, budget = self.sites(model), self.recipe.budget
        gone = tokens_gone(model) if budget.of == "params" and not self.narrows else 0
        return Costs.of(at, budget, total_cost(model, at, budget), gone)


def tokens_gone(model: nn.Module) -> int:
    """Return the parameters of the tokens that the model has lost."""
    return (getattr(model, "liar_vocabulary", None) or {}).get("params_gone", 0)
