"""Speed as a budget: seconds of the sites, corrected by what whole plans take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from torch import nn

from liar_ext.errors import InputError
from liar_ext.measure.latency import measure_latency, plan_of, ratios, sliced, where
from liar_ext.measure.speed import Quartiles
from liar_ext.models.sites import Site
from liar_ext.plan import Budget, Plan
from liar_ext.selection.costs import Costs, LatencyTable

# A plan may miss what its sites add up to by this fraction of the dense seconds.
TOLERANCE = 0.01
# A correction by more than this factor at a time is no error of a sum, but a machine that is busy.
MOST_CORRECTED = 1.5
MOST_ROUNDS = 2
PLACE = ("device", "dtype", "threads", "cpu", "gpu")  # what seconds are of
MISSED = 0.03  # what a warning tells of, by the dense seconds
NOISY = 0.05  # likewise, of their own spread

Allocate = Callable[[Costs], Plan]


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
        *,
        progress: bool = False,
    ) -> None:
        self.model, self.at, self.budget = model, list(at), budget
        self.given = table is not None
        if table is None:
            table = measure_latency(model, budget, at, progress=progress)
        table.check(budget)
        self.table = self.last = table
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

    def settle(self, allocate: Allocate) -> Costs:
        """Return costs that are corrected until they say what a plan made by them takes.

        A correction by which no plan meets the budget any more isn't taken; a warning tells.
        """
        for _ in range(MOST_ROUNDS):
            if not self.fit(allocate(self.costs)):
                break
            try:
                allocate(self.costs)
            except InputError:
                self.table = self.last
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
        self.last, self.table = self.table, replace(self.table, scale=self.table.scale * factor)
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
