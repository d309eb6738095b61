"""A job: its steps, which :func:`liar_ext.prune` calls in their order, and what they find out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from liar_ext.bars import Clock
from liar_ext.calibration.collect import check_finite_weights
from liar_ext.calibration.fingerprints import fingerprint_of
from liar_ext.calibration.gradients import check_loss, check_owned
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.passes import Passes, room_for_sums
from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.checkpoint_store import Checkpoint
from liar_ext.data.batches import Batches, read_batches
from liar_ext.distributed import broadcast, is_first, world_size
from liar_ext.embeddings import Evaluator
from liar_ext.errors import InputError
from liar_ext.latency_table import LatencyTable
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import Site, sites
from liar_ext.narrowing.narrowing import Narrowing, count_kept, narrow
from liar_ext.pipeline.choosing import hold_out, solve
from liar_ext.pipeline.estimate import before_plan
from liar_ext.pipeline.scheduling import NO_GAIN, settled_for, warn_of_what_stays
from liar_ext.pipeline.scoring import check_bank, find_losses, find_scores, runs_over_text
from liar_ext.pipeline.settings import as_run, settings_of
from liar_ext.pipeline.sharing import Known
from liar_ext.pipeline.speed import Speed
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.layerwise import check_walk
from liar_ext.reconstruction.one_pass import certified_errors, with_bias
from liar_ext.report.report import Report, versions
from liar_ext.rows import SiteRow, what_to_know
from liar_ext.selection.allocation import allocate, check_budget, even_plan
from liar_ext.selection.costs import Costs, total_cost
from liar_ext.selection.criteria import get_criterion
from liar_ext.selection.curve_allocation import predict_divergence
from liar_ext.selection.divergence import Divergence
from liar_ext.selection.rounding import rounding
from liar_ext.selection.whole_experts import KeptExperts, choose_experts, count_experts_kept
from liar_ext.surgery.units import apply_plan

Weights = dict[str, tuple[Tensor, Tensor | None]]


@dataclass
class Job:
    """One run of :func:`liar_ext.prune`: its steps in their order, and facts for the report."""

    model: nn.Module
    batches: Batches | None
    recipe: Recipe
    progress: bool = False
    bank: MomentBank | None = None
    known: Known | None = None  # what other jobs have found, of the same model, bank and text
    clock: Clock = field(default_factory=Clock)
    evaluator: Evaluator = field(default_factory=Evaluator)
    narrowing: Narrowing | None = None
    experts: KeptExperts | None = None
    rows: list[SiteRow] = field(default_factory=list)
    sensitivities: dict[str, float] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    source: Mapping[str, int] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    widest: int = 0  # features of the widest site
    fresh: Divergence | None = None
    earlier: list[dict[str, object]] = field(default_factory=list)  # jobs before this one
    grid: dict[str, object] = field(default_factory=dict)
    speed: Speed | None = None  # for a budget of latency
    notes: list[str] = field(default_factory=list)  # what to know of how the job was done
    saved: Checkpoint | None = None  # where it keeps what is done
    judged: Batches | None = None  # text that decides the schedule, and nothing else

    def __post_init__(self) -> None:
        self.asked, self.recipe = self.recipe, self.recipe.settled()
        self.notes += getattr(self.model, "liar_notes", [])
        if self.known is None:
            self.known = Known.of_bank(self.bank)

    def check(self) -> None:
        """Raise InputError for whatever can't work, before the first batch is asked for."""
        model, at = self.model, self.sites(self.model)
        if not self.measures:
            self.judged = None
            self._choose_schedule(at)
        recipe = self.recipe
        if recipe.of == "latency" and world_size() > 1:
            raise InputError(
                "prune: of latency times the model, which all ranks would at once, and "
                f"{world_size()} ranks share the job; leave it out, or run the job in one process"
            )
        self.earlier = stock_config.history_of(model.config)
        warn_of_what_stays(model, recipe.prunable_kinds, at)
        if self.bank is not None:
            self.batches = check_bank(recipe, self.known, self.bank, self.batches, model, at)
        check_budget(at, recipe.budget, recipe.allocation, self.costs(model))
        self.params = {"before": count_params(model), "prunable_before": sum(s.params for s in at)}
        if recipe.keep_experts != 1.0:
            count_experts_kept(model, recipe.keep_experts)
        if self.narrows:
            count_kept(hidden_of(model), recipe.keep_hidden, recipe.tile)
        backward = get_criterion(recipe.criterion).needs == "gradient"
        if backward:
            check_owned(at)
        if self.saved is not None or runs_over_text(recipe, self.known, model, at):
            self.batches = list(self.batches or ())  # to be gone through again
        if recipe.schedule == "layerwise":
            self._check_walk()
        if self.measures:
            self._hold_out(at)
        if backward and self.batches:
            check_loss(model, self.batches[0])

    @property
    def measures(self) -> bool:
        """Whether the schedule is chosen by what whole models give on held-out text."""
        auto = self.asked.schedule == "auto" and self.recipe.schedule == "layerwise"
        # Fewer hidden features are no states to compare with the dense model's.
        return auto and not self.narrows and (self.bank is None or self.judged is not None)

    def _hold_out(self, at: Sequence[Site]) -> None:
        """Keep some of the calibration text apart, unless other text is given to judge by."""
        if self.judged is None:
            self.batches, judged = hold_out(read_batches(self.batches))
            self.judged = judged or None
        if self.judged is None:
            self._choose_schedule(at)

    def _choose_schedule(self, at: Sequence[Site]) -> None:
        """Solve in one pass by default where a walk gains nothing."""
        settled = settled_for(self.asked, at)
        if self.recipe.schedule == "layerwise" and settled.schedule == "one-pass":
            self._in_one_pass(NO_GAIN)

    def _check_walk(self) -> None:
        """Refuse to walk blocks that can't be run one by one, or do without one by default."""
        check_finite_weights(self.model)  # before anything is run
        try:
            check_walk(self.model, self.batches)
        except InputError as error:
            if self.asked.schedule != "auto":
                raise
            self._in_one_pass(str(error).removeprefix("layerwise: ").partition("; use")[0])

    def _in_one_pass(self, reason: str) -> None:
        self.recipe = replace(self.recipe, schedule="one-pass")
        self.notes.append(f"Layers were solved in one pass, not one after the other: {reason}.")

    @property
    def narrows(self) -> bool:
        """Whether the hidden size is pruned."""
        return self.recipe.keep_hidden != 1.0

    @cached_property
    def room(self) -> int:
        """Bytes that sums may take at a time; what is free changes while a job runs."""
        return room_for_sums(self.model, self.recipe.memory)

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites that may be pruned."""
        return sites(model, self.recipe.prunable_kinds, self.recipe.attn_unit)

    def costs(self, model: nn.Module) -> Costs:
        """Return what the sites cost in the budget's unit; latency is measured once for a model."""
        at, budget = self.sites(model), self.recipe.budget
        if budget.of != "latency":
            return Costs.of(at, budget, total_cost(model, at, budget))
        if self.speed is None or self.speed.model is not model:
            with self.clock("time"):
                given = self.recipe.latency_table
                table = None if given is None else LatencyTable.load(given)
                self.speed = Speed(model, at, budget, table, progress=self.progress)
                check_budget(at, budget, costs=self.speed.costs)
                if budget.keep < 1.0 and not self.speed.given:
                    self.speed.fit(even_plan(at, budget, self.speed.costs))
        return self.speed.costs

    def evaluate(self, batches: Sequence[Mapping[str, Tensor]] | None) -> dict[str, float] | None:
        """Measure, at the first rank, the model as it is now, if there is text."""
        if batches is None or not is_first():
            return None
        with self.clock("evaluate"):
            return self.evaluator(self.model, batches, progress=self.progress)

    def narrow(self) -> nn.Module:
        """Return the model to prune: itself, or a copy with fewer hidden features or experts."""
        recipe = self.recipe
        if recipe.keep_experts != 1.0:
            keep, settings = recipe.keep_experts, {**self._mode, "damp": recipe.damp}
            with self.clock("experts"):
                self.experts = choose_experts(
                    self.model, self.batches, keep, memory=self.room, **settings
                )
                self.source = self.experts.source
                return self.experts.applied_to_copy(self.model)
        if not self.narrows:
            return self.model
        with self.clock("narrow"):
            self.narrowing = narrow(
                self.model,
                self.batches,
                recipe.keep_hidden,
                damp=recipe.damp,
                tile=recipe.tile,
                memory=recipe.memory,
                **self._mode,
            )
            self.source = self.narrowing.source
            self.grid = {"tile": recipe.tile, "hidden": self.narrowing.grid}
            self.facts["narrow_passes"] = self.source["passes"]
            return self.narrowing.applied_to_copy(self.model)

    def calibrate(self, model: nn.Module) -> Passes | None:
        """Return the moments of all sites, in groups that fit; None where only narrowing is left.

        They are summed where :meth:`score` and :meth:`reconstruct` ask for them.
        """
        at = self.sites(model)
        self.widest = max(site.d_in for site in at)
        self.params["prunable_after"] = sum(site.params for site in at)
        if (self.narrowing or self.experts) and self.recipe.keep == 1.0:
            return None
        text = () if self.batches is None else self.batches
        kept = {"bank": self.bank, "saved": self.saved}
        return Passes(model, text, at, self.room, **kept, progress=self.progress)

    def before_plan(self) -> dict[str, int | None]:
        """Return the steps by stage that a plan takes, None for all: a known one spares them."""
        return before_plan(self.sites(self.model), self.recipe)

    def weights_digest(self) -> str:
        """Return what tells the model's weights from others."""
        return fingerprint_of(self.model.state_dict().items())

    def score(self, passes: Passes | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scores of all units, and for ``curve`` the losses of all sites."""
        scores, losses = {}, {}
        if passes is None:
            return scores, losses
        given = self.recipe, self.known, passes
        for group in self.clock.each("calibrate", passes):
            # No name for the bank: its memory is for the next group.
            with self.clock("score"):
                scores |= find_scores(*given, group, progress=self.progress)
            if self.recipe.allocation == "curve":
                with self.clock("allocate"):
                    shown = {"saved": self.saved, "progress": self.progress, "notes": self.notes}
                    found = find_losses(*given, group, scores, **shown)
                    losses |= found[0]
                    self.sensitivities |= found[1]
        return scores, losses

    def allocate(
        self, passes: Passes | None, scores: dict[str, Tensor], losses: dict[str, Tensor]
    ) -> Plan:
        """Return the plan that meets the budget."""
        recipe, budget = self.recipe, self.recipe.budget
        if passes is None:
            return Plan(self.model.config.model_type, recipe.attn_unit, {}, budget.to_dict())
        at, costs = self.sites(passes.model), self.costs(passes.model)
        asked = at, scores, budget, recipe.allocation
        if self.speed is not None:
            with self.clock("time"):
                costs = self.speed.settle(
                    lambda costs: allocate(*asked, costs=costs, losses=losses)
                )
        with self.clock("allocate"):
            model_type = passes.model.config.model_type
            plan = allocate(*asked, model_type=model_type, costs=costs, losses=losses)
            plan = with_bias(plan, passes.model, recipe.reconstruct)
            plan = broadcast(plan)  # the same everywhere, whatever machines they are
            if recipe.allocation == "curve":
                self.facts["predicted_divergence"] = predict_divergence(losses, plan)
            self.grid |= rounding(*asked, plan, costs=costs, losses=losses)
        if self.speed is not None:
            with self.clock("time"):
                self.speed.time(plan)
        return plan

    def reconstruct(
        self,
        passes: Passes | None,
        plan: Plan,
        fresh: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Weights:
        """Return the new weights of all consumers, by the schedule.

        A walk measures its errors on fresh text, if there is any, on its way.
        """
        if passes is None:
            return {}
        chosen = solve(self, passes, plan, fresh)
        weights, self.rows = chosen.solved
        if chosen.divergences:
            self.recipe = replace(self.recipe, schedule=chosen.schedule)
            self.facts["schedules"] = chosen.divergences
            self.notes.append(chosen.said)
        self.source = passes.bank.source
        self.params["prunable_after"] = sum(row.params_after for row in self.rows)
        self.facts["calibrate_passes"] = passes.taken
        return weights

    def certify(
        self,
        batches: Sequence[Mapping[str, Tensor]] | None,
        passes: Passes | None,
        plan: Plan,
        weights: Weights,
    ) -> None:
        """Measure the sites on fresh text, if there is any; the sliced model comes later."""
        if batches is None:
            return
        with self.clock("certify"):
            self.fresh = Divergence(self.model, batches)
            if passes is not None and self.recipe.schedule == "one-pass":
                passes.bank = MomentBank()  # its memory is for the fresh sums
                at = self.sites(passes.model)
                fresh = Passes(passes.model, batches, at, self.room, progress=self.progress)
                errors = certified_errors(fresh, plan, weights)
                self.rows = [replace(row, certified_error=errors[row.name]) for row in self.rows]

    def slice(self, plan: Plan, weights: Weights) -> Plan:
        """Slice the model; return the plan, with the hidden features that stay."""
        if self.narrowing is not None:
            plan = replace(plan, hidden=self.narrowing.kept)
            weights = {**self.narrowing.weights, **weights}
        if self.experts is not None:
            plan = replace(plan, experts=self.experts.plans)
            weights = {**self.experts.scales, **weights}
        whole = stock_config.from_dense(self.model, plan)
        with self.clock("surgery"):
            apply_plan(self.model, plan, weights)
            self.params |= {"after": count_params(self.model)}
            done = {"params": [self.params["before"], self.params["after"]]}
            stock_config.describe(self.model, {"budget": self.recipe.budget.to_dict(), **done})
        self.model.liar_plan = whole
        return whole

    @property
    def _mode(self) -> dict[str, object]:
        return {"mode": self.recipe.reconstruct, "progress": self.progress}

    def report(
        self, plan: Plan, dense: dict[str, float] | None, pruned: dict[str, float] | None
    ) -> Report:
        """Return every number that a user needs to trust the result."""
        model, hidden_rows = self.model, self.narrowing.rows if self.narrowing else []
        # What was measured is measured again where the recipe is.
        asked = self.recipe if self.judged is None else replace(self.recipe, schedule="auto")
        rows = [replace(row, sensitivity=self.sensitivities.get(row.name)) for row in self.rows]
        evaluation = {"dense": dense, "pruned": pruned} if dense and pruned else {}
        if self.fresh is not None:
            with self.clock("certify"):
                evaluation["certified"] = self.fresh.of(model)
        return Report(
            model=self.recipe.model or model.config.name_or_path or type(model).__name__,
            plan=plan,
            recipe=as_run(asked, model, self.source),
            budget=self.recipe.budget.to_dict(),
            earlier=self.earlier,
            settings=settings_of(self.recipe, model, plan, self.source, self.facts),
            versions=versions(),
            sites=(self.experts.rows if self.experts else []) + rows,
            hidden=hidden_rows,
            grid=self.grid,
            params=self.params,
            latency={} if self.speed is None else self.speed.facts(),
            evaluation=evaluation,
            seconds=self.clock.seconds,
            warnings=what_to_know(
                [*self.rows, *hidden_rows],
                self.recipe.reconstruct,
                self.source["tokens"],
                self.widest,
            )
            + self.notes
            + self.grid.get("warnings", [])
            + ([] if self.speed is None else self.speed.warnings()),
            loading=stock_config.how_to_load(model, plan),
        )
