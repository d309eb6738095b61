"""The state of a job: its settings, what is known already, and where its result goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import Batch, Batches, read_batch, read_batches
from liar_ext.calibration.collect import Passes
from liar_ext.calibration.divergence import Divergence
from liar_ext.checkpoint.folder import fixed_inputs
from liar_ext.checkpoint.saving import Shards, fill_folder
from liar_ext.measure.embeddings import Evaluator
from liar_ext.measure.latency import measure_latency, plan_of, ratios, sliced, where
from liar_ext.measure.latency_table import LatencyTable
from liar_ext.measure.speed import Quartiles
from liar_ext.models.plan import Budget, Plan
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_fields import recipe_fields
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import Site, get_consumer_bias, sites
from liar_ext.reconstruction.ridge import form_at
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.report.report import Report
from liar_ext.selection.allocation import check_budget, even_plan
from liar_ext.selection.costs import Costs, total_cost
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.distributed import alone, is_first
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Clock, hiding_bars

SENSITIVITY = "sensitivity"
TOLERANCE = 0.01  # of the dense seconds, by which a plan may miss the sum over its sites
MOST_CORRECTED = 1.5  # a larger correction is no error of that sum, but a machine that is busy
MOST_ROUNDS = 2
PLACE = ("device", "dtype", "threads", "cpu", "gpu")  # of a machine, for seconds to compare
MISSED, NOISY = 0.03, 0.05  # fractions of the dense seconds that a warning tells of
Value = TypeVar("Value")


@dataclass
class Known:
    """Values of sites that were found for one dense model and its moments, by kind and key."""

    found: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    probe_keep: float | None = None  # of a site whose sensitivity is measured; None: the budget's

    @classmethod
    def of_bank(cls, bank: MomentBank | None, probe_keep: float | None = None) -> Known:
        """Return the sensitivities that a bank has."""
        if not isinstance(bank, MomentBank | None):
            raise InputError(
                f"bank: must be a MomentBank, got {type(bank).__name__}; MomentBank.load reads one"
            )
        stored = () if bank is None else bank.source.get("sensitivities", ())
        return cls({(SENSITIVITY, each["key"]): dict(each["sites"]) for each in stored}, probe_keep)

    def get(
        self,
        what: str,
        key: str,
        at: Sequence[Site],
        compute: Callable[[Sequence[Site]], Mapping[str, Value]],
    ) -> dict[str, Value]:
        """Return the values of sites by name; ``compute`` returns those that aren't there."""
        known = self.found.setdefault((what, key), {})
        missing = [site for site in at if _place(site) not in known]
        values = compute(missing) if missing else {}
        known |= {_place(site): values[site.name] for site in missing}
        return {site.name: known[_place(site)] for site in at}

    def has(self, what: str, key: str, at: Sequence[Site]) -> bool:
        """Tell whether the values of all sites are there."""
        return self.found.get((what, key), {}).keys() >= set(map(_place, at))

    def store_sensitivities(self, bank: MomentBank) -> None:
        """Put the measured sensitivities into a bank, for later jobs."""
        measured = {key: own for (what, key), own in self.found.items() if what == SENSITIVITY}
        bank.source["sensitivities"] = [{"key": k, "sites": own} for k, own in measured.items()]


def _place(site: Site) -> str:
    """Return a site with its units, as a key."""
    return f"{site.name} {site.unit} {site.units} {site.groups}"


def per(recipe: Recipe) -> str:
    """Return whether scores are of features, to compare them across layers, or of units."""
    return "feature" if recipe.allocation == "global" else "unit"


def score_key(recipe: Recipe, **more: object) -> str:
    """Return all that scores and error curves depend on, beside the site."""
    chosen = {each.name: getattr(recipe, each.name) for each in recipe_fields(affects="scores")}
    facts = {**chosen, "per": per(recipe), "liar_ext": version("liar_ext"), **more}
    return json.dumps(facts, sort_keys=True)


def sensitivity_key(recipe: Recipe, known: Known, model: nn.Module, at: Sequence[Site]) -> str:
    """Return all that sensitivities depend on, beside the site: also the form of new weights."""
    forms = {get_consumer_bias(model, site) is not None for site in at}
    mode = recipe.reconstruct
    form = form_at(mode, *forms) if len(forms) == 1 else mode
    return score_key(recipe, keep=known.probe_keep or recipe.keep, form=form)


@dataclass(frozen=True)
class Shares:
    """The parts of a job's memory, in bytes."""

    need: dict[str, int]  # the peak without hidden states, by its parts
    shard: int  # of what is written at a time
    states: int  # hidden states in memory; what is more lies in a file
    keep_sums: bool  # whether the sums of all blocks are held


class Speed:
    """The seconds that sites take, by a given ``table`` or measured, and those of whole plans."""

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
        self.is_here = all(table.where.get(key) == here.get(key) for key in PLACE)
        self.timed: dict[str, int] | None = None
        self.predicted = 1.0
        self.measured: Quartiles | None = None  # a plan's seconds by the dense ones

    @property
    def costs(self) -> Costs:
        """Seconds of every site by count, and of the dense model."""
        return Costs.measured(self.table, self.at)

    def settle(self, allocate: Callable[[Costs], Plan]) -> Costs:
        """Return costs, corrected until they agree with the time of a plan made by them."""
        for _ in range(MOST_ROUNDS):
            before = self.table
            if not self.fit(allocate(self.costs)):
                break
            try:
                allocate(self.costs)
            except InputError:  # no plan meets the budget any more; a warning tells
                self.table = before
                break
        return self.costs

    def fit(self, plan: Plan) -> bool:
        """Time a plan; correct costs that say another time, and tell whether they did.

        ``scale ← scale · (1 − measured) / (1 − predicted)``, both by the dense seconds. A table
        that was given stays as it is.
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
        """Time a plan beside the dense model, unless it was the last one."""
        counts = {site.name: len(plan.sites[site.name].kept) for site in self.at}
        self.predicted = self.costs.kept_fraction(plan)
        if counts == self.timed or not self.is_here:  # seconds of another machine don't compare
            return
        models = {"pruned": sliced(self.model, plan_of(self.model, self.at, counts))}
        models["dense"] = self.model
        self.measured = ratios(models, self.budget)["pruned"]
        self.timed = counts

    def facts(self) -> dict[str, object]:
        """Return fractions of the dense seconds, and the table, for a report."""
        return {
            "dense_seconds": self.table.total,
            "predicted": self.predicted,
            "measured": None if self.measured is None else asdict(self.measured),
            "table": self.table.to_dict(),
        }

    def warnings(self) -> list[str]:
        """Tell of a time that varied, and of a plan that is slower than asked for."""
        found, noise = [], self.table.spread / self.table.total
        again = "measure again on a machine that does nothing else."
        if noise > NOISY:
            found.append(f"The time of the dense model varied by {noise:.0%} of it: {again}")
        if self.measured is not None and self.measured.median > self.budget.keep + MISSED:
            found.append(
                f"The plan takes {self.measured.median:.3g} of the dense time, where "
                f"{self.budget.keep:.3g} was asked for: give a lower keep, or {again}"
            )
        return found


class Folder:
    """The folder, begun by ``begin``, for the blocks of a walk; the first rank writes it."""

    def __init__(self, walk: Walk, begin: Callable[[], Path]) -> None:
        dtype, inputs = walk.model.dtype, fixed_inputs(walk.model)
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        fixed = [read_batch(given)] if is_first() else []
        self.walk, self.fixed = walk, StreamedBatches("fingerprint", walk, fixed)
        self.begin, self.shards = begin, None

    def add(self, index: int | None, size: int) -> None:
        """Write a block, or all outside of the blocks, in shards of ``size`` bytes."""
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
    """One run of :func:`liar_ext.prune`: as it is asked for, then as :func:`prepare` returns it."""

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
        """Let stages show bars of their own, unless they are steps of a walk."""
        return nullcontext() if self.walk is None else hiding_bars()

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites that may be pruned."""
        return sites(model, self.recipe.prunable_kinds, self.recipe.attn_unit)

    def timed(self, model: nn.Module) -> Speed | None:
        """Return the seconds of the sites of a model, for a budget of latency."""
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
        """Return the costs of the sites in the budget's unit."""
        if self.recipe.of == "latency":
            return self.timed(model).costs
        at, budget = self.sites(model), self.recipe.budget
        gone = tokens_gone(model) if budget.of == "params" and not self.narrows else 0
        return Costs.of(at, budget, total_cost(model, at, budget), gone)


class Evaluation:
    """Measures a model: on held-out text at the first rank, on fresh text at all.

    Both texts of a walk are ``along``, at the first rank: they pass the blocks in both walks, after
    which only the head is run.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.outputs, self.evaluator = job, None, Evaluator()
        self.texts = [job.evaluate_on if is_first() else None, job.certify_on]
        if job.walk is not None:
            texts = (job.evaluate_on, job.certify_on) if is_first() else (None, None)
            held_out, fresh = (list(read_batches(text or ())) for text in texts)
            if predicts_next_token(job.model):
                held_out = list(map(_as_judged, held_out))
            self.texts = [held_out or None, fresh or None]
        self._begin()
        self.dense = self.quality() if job.walk is None else None

    def _begin(self) -> None:
        """Let the texts of a walk begin."""
        walk, named = self.job.walk, zip(("held out", "fresh"), self.texts, strict=True)
        streams = (StreamedBatches(name, walk, text or ()) for name, text in named)
        self.along = () if walk is None else tuple(streams)

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
        if self.texts[0] is None:
            return None
        with self._measuring("evaluate", 0):
            return self.evaluator(self.job.model, self.texts[0])

    def see_dense(self, passes: Passes | None = None) -> None:
        """Note the outputs of the dense model on fresh text, before it is sliced.

        After its walk also the quality; both texts begin again then, for the pruned model.
        """
        if self.along:
            if passes is not None:
                passes.passed.restore()
            self.dense = self.quality()
        if self.texts[1] is not None:
            with self._measuring("certify", 1):
                self.outputs = Divergence(self.job.model, self.texts[1])
        for each in self.along:
            each.hidden.clear()  # needed no more
        self._begin()

    def result(self) -> dict[str, dict[str, float]]:
        """Measure the pruned model; return all measurements for a report."""
        found = {"dense": self.dense, "pruned": self.quality()}
        found = {} if None in found.values() else found
        if self.outputs is not None:
            with self._measuring("certify", 1):
                found["certified"] = self.outputs.of(self.job.model)
        return found


def _as_judged(batch: Batch) -> Batch:
    """Return a batch as the model gets it for its perplexity."""
    ids = batch.inputs["input_ids"]
    mask = ids.new_ones(ids.shape) if batch.mask is None else batch.mask.to(ids.dtype)
    return read_batch({**batch.inputs, "attention_mask": mask})


def tokens_gone(model: nn.Module) -> int:
    """Return the parameters of the tokens that the model has lost."""
    return (getattr(model, "liar_vocabulary", None) or {}).get("params_gone", 0)
