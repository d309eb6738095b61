"""Allocation: turn scores and a budget into a plan."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liar_ext.models.plan import Budget, Plan, SitePlan
from liar_ext.models.sites import Site, attn_unit_of
from liar_ext.models.slicing import allowed_counts
from liar_ext.selection.costs import Costs, choose
from liar_ext.selection.criteria import check_given
from liar_ext.system.errors import InputError


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
        rounded up and channels make up for it. ``global``: scores are standardised within a site,
        and the highest stay, wherever they are, as in FLAP with ``score(..., per="feature")``.
        ``curve``: the least sum of ``losses``, see :func:`liar_ext.selection.costs.choose`.
    model_type : str
        For the record in the plan.
    total : float, optional
        Dense cost of the whole model, from :func:`liar_ext.selection.costs.total_cost`; needed
        where the budget counts more than the sites, unless ``costs`` say it.
    losses : mapping of str to Tensor, optional
        For ``curve``: ``(units + 1,)`` by site name, what the model loses when k units of the site
        are gone, in one unit for all sites; they add up.
    costs : Costs, optional
        What sites cost where that is not proportional to units, as for latency. No method takes a
        count that costs no less than a larger one.

    Raises
    ------
    InputError
        If the method is unknown, scores or losses are missing or not finite, or no plan can meet
        the budget.
    """
    problem = check_budget(at, budget, method, costs or Costs.of(at, budget, total))
    _check_values(at, scores, "scores", lambda site: (site.units, site.d_in))
    if method == "curve":
        if losses is None:
            raise InputError("allocate: method curve needs losses, such as those of error_curves")
        _check_values(at, losses, "losses", lambda site: (site.units + 1,))
    if method == "global":
        scores = {site.name: _metric(site, scores[site.name]) for site in at}
    steps = _METHODS[method](problem, losses if method == "curve" else scores)
    pairs = zip(problem.teams, steps, strict=True)
    counts = {site.name: team.counts[step] for team, step in pairs for site in team.sites}
    return _plan(at, scores, counts, model_type, {**budget.to_dict(), "allocation": method})


def _check_values(
    at: Sequence[Site],
    values: Mapping[str, Tensor],
    what: str,
    sizes: Callable[[Site], tuple[int, ...]],
) -> None:
    """Raise InputError unless every site has finite values, as many as one of some sizes."""
    if not at:
        raise InputError("allocate: there is no site to prune; give at least one")
    check_given(at, values, f"allocate: {what}")
    for site in at:
        found, fits = values[site.name], sizes(site)
        if len(found) not in fits or not found.isfinite().all():
            raise InputError(
                f"allocate: {what} must be {' or '.join(map(str, fits))} finite numbers for "
                f"{site.name}, got {len(found)}; give those of the same sites of the same model"
            )


def even_plan(
    at: Sequence[Site], budget: Budget, costs: Costs | None = None, *, model_type: str = ""
) -> Plan:
    """Return a plan of ``uniform`` for its sizes alone, before any score is known."""
    scores = {site.name: torch.arange(site.units, 0, -1.0) for site in at}
    return allocate(at, scores, budget, "uniform", model_type=model_type, costs=costs)


def probe_plan(
    at: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, *, model_type: str = ""
) -> Plan:
    """Return a plan that takes about the budget's fraction, and at least one unit, off every site.

    For measuring sensitivities: it need not meet the budget, and heeds no tile.
    """
    counts = {}
    for site in at:
        fewer = allowed_counts(site, replace(budget, tile=1))[:-1] or (site.units,)
        counts[site.name] = fewer[_nearest(fewer, budget.keep * site.units)]
    return _plan(at, scores, counts, model_type, budget.to_dict())


def _plan(
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    model_type: str,
    budget: dict[str, object],
) -> Plan:
    plan = {}
    for site in at:
        values = site.per_unit(scores[site.name])
        plan[site.name] = SitePlan(site.units, select(values, counts[site.name], site.groups))
    return Plan(model_type, attn_unit_of(at), plan, budget)


def check_budget(
    at: Sequence[Site], budget: Budget, method: str = "uniform", costs: Costs | None = None
) -> _Problem:
    """Raise what :func:`allocate` would raise, before any score is known."""
    if method not in _METHODS:
        raise InputError(f"allocate: method must be one of {', '.join(_METHODS)}, got {method!r}")
    costs = costs or Costs.of(at, budget)
    costs.check(at)
    parts: dict[object, list[Site]] = {}
    for site in at:
        alike = (site.kind, site.units, site.width) if budget.uniform_layers else site.team
        parts.setdefault(alike, []).append(site)
    teams = tuple(_Team.of(some, budget, costs) for some in parts.values())
    total, fixed = costs.total + costs.gone, costs.total - sum(team.costs[-1] for team in teams)
    problem = _Problem(teams, budget.keep * total - fixed + 1e-9 * total)
    least = problem.spent([0] * len(teams))
    if least > problem.limit:
        outside = fixed / total
        hint = f"raise keep={budget.keep:.4g}, or lower tile={budget.tile}"
        if budget.of == "params":
            hint += ", or remove tokens or features, too (keep_vocab, keep_hidden)"
        beside = f", of which {outside:.4g} lies outside of them" if outside > 1e-9 else ""
        raise InputError(
            f"allocate: no plan keeps {budget.keep:.4g} of {budget.of}: with tile={budget.tile} "
            f"the sites can go down to {(least + fixed) / total:.4g}{beside}; {hint}"
        )
    return problem


def removal_order(scores: Tensor, groups: int = 1) -> Tensor:
    """Return the units ``(units,)`` in the order in which they go, lowest score first.

    Of ``groups`` runs of units each loses one in turn. Ties: the higher index goes first.
    """
    by_group = scores.reshape(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True).flip(1)
    offset = torch.arange(groups, device=order.device)[:, None] * by_group.shape[1]
    return (order + offset).mT.flatten()


def select(scores: Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """Return the ``count`` best units, equally many of each group, in ascending order."""
    return tuple(sorted(removal_order(scores, groups)[len(scores) - count :].tolist()))


@dataclass(frozen=True)
class _Team:
    """Sites that must keep equally many units, and the numbers that they may keep."""

    sites: tuple[Site, ...]
    costs: tuple[float, ...]  # of all of them together, by units kept, from 0 on
    counts: tuple[int, ...]  # allowed ones, ascending as their costs; the last is all

    @classmethod
    def of(cls, some: Sequence[Site], budget: Budget, costs: Costs) -> _Team:
        both = tuple(map(sum, zip(*(costs.by_count[site.name] for site in some), strict=True)))
        counts: list[int] = []
        for count in reversed(allowed_counts(some[0], budget)):
            if not counts or both[count] < both[counts[-1]]:  # it costs less than every larger one
                counts.append(count)
        return cls(tuple(some), both, tuple(reversed(counts)))

    @property
    def units(self) -> int:
        return self.sites[0].units

    @property
    def kind(self) -> str:
        return self.sites[0].kind

    def cost(self, step: int) -> float:
        return self.costs[self.counts[step]]


@dataclass(frozen=True)
class _Problem:
    """The budget in numbers. A choice is a *step* for each team: the index of one of its counts."""

    teams: tuple[_Team, ...]
    limit: float

    def spent(self, steps: Sequence[int]) -> float:
        return sum(team.cost(step) for team, step in zip(self.teams, steps, strict=True))

    def fraction(self) -> float:
        """Return the largest common fraction of all units that the limit allows, uncounted."""

        def at_fraction(fraction: float) -> float:
            spent = 0.0
            for team in self.teams:
                whole, part = divmod(fraction * team.units, 1.0)
                costs = team.costs[int(whole) : int(whole) + 2]
                spent += costs[0] + part * (costs[-1] - costs[0])
            return spent

        return _largest(at_fraction, self.limit, 1e-15)

    def fill(self, gain: Callable[[_Team, int, int], float], steps: list[int]) -> list[int]:
        """Spend what the limit leaves on the best gains, one step of one team at a time.

        ``gain(team, now, then)`` is the worth of raising a team's count; a team whose next step
        does not fit leaves the race.
        """
        left = self.limit - self.spent(steps)
        race: list[tuple[float, int]] = []  # (-gain, team)

        def enter(number: int) -> None:
            team, then = self.teams[number], steps[number] + 1
            if then < len(team.counts):
                worth = gain(team, team.counts[then - 1], team.counts[then])
                heapq.heappush(race, (-worth, number))

        for number in range(len(self.teams)):
            enter(number)
        while race:
            _, number = heapq.heappop(race)
            team, then = self.teams[number], steps[number] + 1
            price = team.cost(then) - team.cost(then - 1)
            if price <= left:
                left -= price
                steps[number] = then
                enter(number)
        return steps


def _largest(spent: Callable[[float], float], limit: float, precision: float) -> float:
    """Return the largest fraction, in [0, 1], for which what is spent fits the limit."""
    low, high = 0.0, 1.0
    if spent(high) <= limit:
        return high
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= limit else (low, middle)
    return low


def _nearest(counts: Sequence[int], wish: float, up: bool = False) -> int:
    """Return the step of the nearest count not above ``wish``, or not below it for ``up``."""
    wish = round(wish, 9)
    if up:
        return min(bisect.bisect_left(counts, wish), len(counts) - 1)
    return max(bisect.bisect_right(counts, wish) - 1, 0)


def _uniform(problem: _Problem, scores: Mapping[str, Tensor]) -> list[int]:
    """Return counts of one common fraction.

    The kind of fewest units (heads) is rounded up, and the other kind spends the rest. If that
    leaves it less than half of the fraction, heads take the count below, or the least.
    """
    wish = problem.fraction()
    fewest: dict[str, int] = {}
    for team in problem.teams:
        fewest[team.kind] = min(team.units, fewest.get(team.kind, team.units))
    fine = max(fewest, key=fewest.get)
    # A count that is the fraction itself is not rounded up: the limit is a little above the budget.
    up = [_nearest(team.counts, (wish - 1e-6) * team.units, up=True) for team in problem.teams]
    steps = _with_largest(problem, up, fine)
    pairs = zip(problem.teams, steps, strict=True)
    smallest = min(team.counts[step] / team.units for team, step in pairs)
    if problem.spent(steps) <= problem.limit and smallest >= wish / 2:
        return steps
    down = [_nearest(team.counts, wish * team.units) for team in problem.teams]
    steps = _with_largest(problem, down, fine)
    if problem.spent(steps) <= problem.limit:
        return steps
    return _with_largest(problem, [0] * len(problem.teams), fine)


def _with_largest(problem: _Problem, steps: list[int], kind: str) -> list[int]:
    """Return steps with teams of a kind at the largest fraction that the limit allows."""

    def at_fraction(fraction: float) -> list[int]:
        pairs = zip(problem.teams, steps, strict=True)
        return [_nearest(t.counts, fraction * t.units) if t.kind == kind else n for t, n in pairs]

    return at_fraction(_largest(lambda f: problem.spent(at_fraction(f)), problem.limit, 1e-7))


def _metric(site: Site, scores: Tensor) -> Tensor:
    """Return what ``global`` standardises: as in FLAP's code attention's features are squared."""
    values = scores.double()
    squared = site.kind == "attn" and len(values) != site.units
    return values * values.abs() if squared else values


def _global(problem: _Problem, metric: Mapping[str, Tensor]) -> list[int]:
    """Keep the units of highest standardised metric, ``(mean_{j∈u} m_j − mean m) / std m``.

    The mean over its features brings a head near 0: few go before many channels have gone.
    """
    ranked = {}
    for site in (site for team in problem.teams for site in team.sites):
        values = metric[site.name]
        spread = values.std(unbiased=False)
        unit = site.per_unit(values) * (site.units / len(values))
        standard = (unit - values.mean()) / spread if spread > 0 else torch.zeros_like(unit)
        # Of several groups each loses its least unit in turn.
        by_group = standard.reshape(site.groups, -1).sort(descending=True).values
        ranked[site.name] = by_group.T.flatten().numpy(force=True)

    def gain(team: _Team, now: int, then: int) -> float:
        means = [float(ranked[site.name][now:then].mean()) for site in team.sites]
        return sum(means) / len(means)

    return problem.fill(gain, [0] * len(problem.teams))


def _curve(problem: _Problem, losses: Mapping[str, Tensor]) -> list[int]:
    """Keep the counts of the least sum of losses, then spend what is left step by step."""
    # A site that loses more units loses no less; where a curve dips, that is noise.
    lost = {
        site.name: losses[site.name].double().cummax(0).values.flip(0).tolist()
        for team in problem.teams
        for site in team.sites
    }

    def loss(team: _Team, count: int) -> float:
        return sum(lost[site.name][count] for site in team.sites)

    def gain(team: _Team, now: int, then: int) -> float:
        return (loss(team, now) - loss(team, then)) / (team.costs[then] - team.costs[now])

    costs = [[team.costs[count] for count in team.counts] for team in problem.teams]
    options = [[loss(team, count) for count in team.counts] for team in problem.teams]
    return problem.fill(gain, choose(costs, options, problem.limit))


_METHODS: dict[str, Callable[[_Problem, Mapping[str, Tensor]], list[int]]] = {
    "uniform": _uniform,
    "global": _global,
    "curve": _curve,
}
