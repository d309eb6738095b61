"""Allocation: turn scores and a budget into a plan."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.models.sites import Site, teams_of
from liar_ext.plan import Budget, Plan, SitePlan
from liar_ext.selection.costs import Costs
from liar_ext.selection.knapsack import choose

Counts = dict[str, int]
# transformers multiplies all experts of a layer at once, by a kernel that takes rows of a multiple
# of 16 bytes only: 8 channels of two bytes.
GROUPED_STEP = 8


def allocate(
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    method: str = "uniform",
    *,
    model_type: str = "",
    total: float | None = None,
    losses: Mapping[str, Tensor] | None = None,
    costs: Costs | None = None,
) -> Plan:
    """Decide which units stay so that the cost kept is at most ``budget.keep`` of the dense cost.

    Parameters
    ----------
    at : sequence of Site
        The sites that may be pruned.
    scores : mapping of str to Tensor
        ``(units,)``, or ``(d_in,)`` by feature, by site name, higher = keep.
    budget : Budget
        What may stay.
    method : {"uniform", "global", "curve"}
        ``uniform``: every site keeps the same fraction, as near as its units allow: heads are
        rounded to a count and channels make up for it. ``global``: scores are standardised within
        a site, a unit has the mean over its features, and the highest stay, wherever they are. It
        is FLAP's way with scores of features, from ``score(..., per="feature")``, where those of
        attention are squared first; scores of units are standardised as they are. ``curve``: the
        least sum of ``losses``: exact where the costs share few enough grains, else no more than
        with 1/8192 of the budget less for each site; see
        :func:`liar_ext.selection.knapsack.choose`.
    model_type : str
        For the record in the plan.
    total : float, optional
        Dense cost of the whole model in the budget's unit, from
        :func:`liar_ext.selection.costs.total_cost`; needed where the budget counts more than the
        sites, unless ``costs`` say it.
    losses : mapping of str to Tensor, optional
        For ``curve``: ``(units + 1,)`` by site name, what the model loses when k units of the site
        are gone; for instance an error curve times the sensitivity of its site. Losses of
        different sites must have one unit, and they add up.
    costs : Costs, optional
        What sites cost by the number of units kept, where that is not proportional: for latency,
        see :class:`liar_ext.selection.costs.Costs`. No method takes a count that costs no less
        than a larger one.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        If the method is unknown, ``curve`` lacks its losses, or no plan can meet the budget.
    """
    costs = costs or Costs.of(at, budget, total)
    check_budget(at, budget, method, costs)
    if method == "curve" and losses is None:
        raise InputError("allocate: method curve needs losses, such as those of error_curves")
    problem = _Problem.of(at, budget, costs)
    if method == "global":
        scores = {site.name: _metric(site, scores[site.name]) for site in at}
    counts = _METHODS[method](problem, losses if method == "curve" else scores)
    return _plan(at, scores, counts, model_type, {**budget.to_dict(), "allocation": method})


def even_plan(
    at: Sequence[Site], budget: Budget, costs: Costs | None = None, *, model_type: str = ""
) -> Plan:
    """Return a plan of ``uniform`` for its sizes alone, before any score is known."""
    scores = {site.name: torch.arange(site.units, 0, -1.0) for site in at}
    return allocate(at, scores, budget, "uniform", model_type=model_type, costs=costs)


def probe_plan(
    at: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, *, model_type: str = ""
) -> Plan:
    """Return a plan that takes about the budget's fraction, and at least one step, off every site.

    For measuring the sensitivity of each site; it need not meet the budget, and its steps are
    single units, so that what is measured is the same whatever the tile is.
    """
    counts = {}
    for site in at:
        fewer = allowed_counts(site, replace(budget, tile=1))[:-1] or (site.units,)
        counts[site.name] = _round(fewer, budget.keep * site.units, up=False)
    return _plan(at, scores, counts, model_type, budget.to_dict())


def _plan(
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    counts: Counts,
    model_type: str,
    budget: dict[str, object],
) -> Plan:
    plan = {}
    for site in at:
        values = site.per_unit(scores[site.name])
        plan[site.name] = SitePlan(site.units, select(values, counts[site.name], site.groups))
    attn_unit = next((site.unit for site in at if site.kind == "attn"), "kv_group")
    return Plan(model_type, attn_unit, plan, budget)


def check_budget(
    at: Sequence[Site], budget: Budget, method: str = "uniform", costs: Costs | None = None
) -> None:
    """Raise what :func:`allocate` would raise, before any score is known."""
    if method not in _METHODS:
        raise InputError(f"allocate: method must be one of {', '.join(_METHODS)}, got {method!r}")
    _Problem.of(at, budget, costs or Costs.of(at, budget))


def select(scores: Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """Return the ``count`` best units in ascending order.

    Each of ``groups`` runs of units gives equally many. Ties go to the lower index.
    """
    by_group = scores.reshape(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    offset = torch.arange(groups, device=order.device)[:, None] * by_group.shape[1]
    return tuple(sorted((order + offset).flatten().tolist()))


@dataclass(frozen=True)
class _Problem:
    """The budget in numbers: sites, allowed counts and what the sites together may cost."""

    sites: tuple[Site, ...]
    cost: Mapping[str, Sequence[float]]  # by count
    allowed: Mapping[str, tuple[int, ...]]  # counts, ascending as their costs; the last is all
    limit: float  # for the sites together
    teams: tuple[tuple[Site, ...], ...]  # sites that must keep equally many

    @classmethod
    def of(cls, at: Sequence[Site], budget: Budget, costs: Costs) -> _Problem:
        costs.check(at)
        cost, total = costs.by_count, costs.total
        in_sites = sum(cost[site.name][-1] for site in at)
        limit = budget.keep * total - (total - in_sites)
        if budget.uniform_layers:
            kinds = dict.fromkeys((site.kind, site.units, site.width) for site in at)
            teams = tuple(
                tuple(s for s in at if (s.kind, s.units, s.width) == kind) for kind in kinds
            )
        else:
            teams = tuple(tuple(some) for some in teams_of(at).values())
        allowed = {}
        for team in teams:
            counts = _worth_their_cost(allowed_counts(team[0], budget), team, cost)
            allowed |= dict.fromkeys((site.name for site in team), counts)
        problem = cls(tuple(at), cost, allowed, limit + 1e-9 * total, teams)
        least = problem.spent({name: counts[0] for name, counts in allowed.items()})
        if least > problem.limit:
            outside = 1.0 - in_sites / total
            fixed = f", of which {outside:.4g} lies outside of them" if outside > 1e-9 else ""
            raise InputError(
                f"allocate: no plan keeps {budget.keep:.4g} of {budget.of}: with tile="
                f"{budget.tile} the sites can go down to "
                f"{(least + total - in_sites) / total:.4g}{fixed}; raise keep, or lower tile"
            )
        return problem

    def spent(self, counts: Counts) -> float:
        return sum(self.cost[name][count] for name, count in counts.items())

    def price(self, team: tuple[Site, ...], count: int) -> float:
        return sum(self.cost[site.name][count] for site in team)

    def fraction(self) -> float:
        """Return the largest common fraction of all units that the limit allows, uncounted."""

        def at_fraction(fraction: float) -> float:
            spent = 0.0
            for site in self.sites:
                whole, part = divmod(fraction * site.units, 1.0)
                costs = self.cost[site.name][int(whole) : int(whole) + 2]
                spent += costs[0] + part * (costs[-1] - costs[0])
            return spent

        return _largest(at_fraction, self.limit, 1e-15)

    def fill(
        self, gain: Callable[[tuple[Site, ...], int, int], float], start: Counts | None = None
    ) -> Counts:
        """Spend what the limit leaves on the best gains, one step of one team at a time.

        ``gain(team, now, then)`` is the worth per unit of raising a team's count; a team whose next
        step does not fit leaves the race. ``start`` is the least counts if not given.
        """
        counts = start or {site.name: self.allowed[site.name][0] for site in self.sites}
        left = self.limit - self.spent(counts)
        race: list[tuple[float, int, int]] = []  # (-gain, team, index of the next allowed count)

        def enter(team_index: int, step: int) -> None:
            team = self.teams[team_index]
            allowed = self.allowed[team[0].name]
            if step < len(allowed):
                worth = gain(team, allowed[step - 1], allowed[step])
                heapq.heappush(race, (-worth, team_index, step))

        for team_index, team in enumerate(self.teams):
            enter(team_index, self.allowed[team[0].name].index(counts[team[0].name]) + 1)
        while race:
            _, team_index, step = heapq.heappop(race)
            team = self.teams[team_index]
            allowed = self.allowed[team[0].name]
            price = self.price(team, allowed[step]) - self.price(team, allowed[step - 1])
            if price <= left:
                left -= price
                counts.update({site.name: allowed[step] for site in team})
                enter(team_index, step + 1)
        return counts


def site_step(site: Site, budget: Budget) -> int:
    """Return the units between two counts that a site may keep: channels come in tiles.

    Those of experts come in eights, where the dense model's do, whatever the tile is.
    """
    if site.unit != "channel":
        return site.groups
    base = 1 if site.expert is None else math.gcd(site.units, GROUPED_STEP)
    return budget.step(site.units, base)


def allowed_counts(site: Site, budget: Budget) -> tuple[int, ...]:
    """Return the unit counts that a site may keep, ascending: its grid, and all of its units."""
    step = site_step(site, budget)
    return (*range(step, site.units, step), site.units)


def _worth_their_cost(
    counts: Sequence[int], team: Sequence[Site], cost: Mapping[str, Sequence[float]]
) -> tuple[int, ...]:
    """Return the counts that cost less than every larger one, ascending."""
    kept: list[int] = []
    least = math.inf
    for count in reversed(counts):
        price = sum(cost[site.name][count] for site in team)
        if price < least:
            kept.append(count)
            least = price
    return tuple(reversed(kept))


def _largest(spent: Callable[[float], float], limit: float, precision: float) -> float:
    """Return the largest fraction, in [0, 1], for which what is spent fits the limit."""
    low, high = 0.0, 1.0
    if spent(high) <= limit:
        return high
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= limit else (low, middle)
    return low


def _uniform(problem: _Problem, scores: Mapping[str, Tensor]) -> Counts:
    """Return counts of one common fraction.

    The kind of fewest units (heads) takes the allowed count below or above the fraction, the other
    kind spends the rest; of the two, the one that strays less from the common fraction.
    """
    wish = problem.fraction()
    kinds = sorted({s.kind for s in problem.sites}, key=lambda kind: _fewest(problem, kind))
    coarse = [site for site in problem.sites if site.kind != kinds[-1]]
    fine = [site for site in problem.sites if site.kind == kinds[-1]]
    below = {s.name: _round(problem.allowed[s.name], wish * s.units, up=False) for s in coarse}
    above = {s.name: _round(problem.allowed[s.name], wish * s.units, up=True) for s in coarse}
    least = {s.name: problem.allowed[s.name][0] for s in coarse}
    plans = []
    for counts in (below, above, least):
        counts |= _largest_fraction(problem, fine, problem.limit - problem.spent(counts))
        strays = sum(abs(counts[site.name] / site.units - wish) for site in problem.sites)
        plans.append((problem.spent(counts) > problem.limit, strays, counts))
    return min(plans, key=lambda plan: plan[:2])[2]


def _fewest(problem: _Problem, kind: str) -> int:
    return min(site.units for site in problem.sites if site.kind == kind)


def _round(allowed: tuple[int, ...], wish: float, up: bool) -> int:
    """Return the nearest allowed count not above ``wish`` (or not below it, for ``up``)."""
    wish = round(wish, 9)
    if up:
        return allowed[min(bisect.bisect_left(allowed, wish), len(allowed) - 1)]
    return allowed[max(bisect.bisect_right(allowed, wish) - 1, 0)]


def _largest_fraction(problem: _Problem, at: Sequence[Site], limit: float) -> Counts:
    """Return the counts of the largest fraction of ``at`` that costs at most ``limit``."""

    def at_fraction(fraction: float) -> Counts:
        return {s.name: _round(problem.allowed[s.name], fraction * s.units, up=False) for s in at}

    return at_fraction(_largest(lambda f: problem.spent(at_fraction(f)), limit, 1e-7))


def _metric(site: Site, scores: Tensor) -> Tensor:
    """Return what ``global`` standardises, float64: attention's scores of features are squared.

    So does the code of FLAP, of which the paper does not speak; a negative score stays below zero.
    """
    values = scores.double()
    squared = site.kind == "attn" and len(values) != site.units
    return values * values.abs() if squared else values


def _global(problem: _Problem, metric: Mapping[str, Tensor]) -> Counts:
    """Keep the units of highest standardised metric, wherever they are, while the limit allows.

    ``(mean_{j∈u} m_j − mean m) / std m``. The mean over its features brings a head near 0, so that
    few heads go before many channels have gone. (All units of a site cost the same, so that FLAP's
    order is that of the score per cost, too.)
    """
    ranked = {}
    for site in problem.sites:
        values = metric[site.name]
        spread = values.std(unbiased=False)
        unit = site.per_unit(values) * (site.units / len(values))
        standard = (unit - values.mean()) / spread if spread > 0 else torch.zeros_like(unit)
        # Of several groups each loses its least unit in turn.
        by_group = standard.reshape(site.groups, -1).sort(descending=True).values
        ranked[site.name] = by_group.T.flatten().numpy(force=True)

    def gain(team: tuple[Site, ...], now: int, then: int) -> float:
        return sum(float(ranked[site.name][now:then].mean()) for site in team) / len(team)

    return problem.fill(gain)


def _curve(problem: _Problem, losses: Mapping[str, Tensor]) -> Counts:
    """Keep the counts of the least sum of losses, then spend what is left step by step."""
    # A site that loses more units loses no less; where a curve dips, that is noise.
    lost = {
        site.name: losses[site.name].double().cummax(0).values.flip(0).tolist()
        for site in problem.sites
    }

    def loss(team: tuple[Site, ...], count: int) -> float:
        return sum(lost[site.name][count] for site in team)

    options = [problem.allowed[team[0].name] for team in problem.teams]
    taken = choose(
        [
            [problem.price(team, count) for count in counts]
            for team, counts in zip(problem.teams, options, strict=True)
        ],
        [
            [loss(team, count) for count in counts]
            for team, counts in zip(problem.teams, options, strict=True)
        ],
        problem.limit,
    )
    counts = {
        site.name: allowed[index]
        for team, allowed, index in zip(problem.teams, options, taken, strict=True)
        for site in team
    }

    def gain(team: tuple[Site, ...], now: int, then: int) -> float:
        price = problem.price(team, then) - problem.price(team, now)
        return (loss(team, now) - loss(team, then)) / price

    return problem.fill(gain, counts)


_METHODS: dict[str, Callable[[_Problem, Mapping[str, Tensor]], Counts]] = {
    "uniform": _uniform,
    "global": _global,
    "curve": _curve,
}
