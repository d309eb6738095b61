"""Costs: what sites take of a budget by the units kept, and the least loss within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from liar_ext.measure.latency_table import LatencyTable
from liar_ext.models.layers import is_transposed
from liar_ext.models.plan import Budget, Plan
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import Site, sites
from liar_ext.system.errors import InputError

MAX_GRAINS = 8192


@dataclass(frozen=True)
class Costs:
    """What every site costs by the number of units that it keeps, and what the model costs.

    Parameters
    ----------
    by_count : mapping of str to sequence of float
        ``(units + 1,)`` by site name: the cost when k units stay. Any shape will do; a count that
        costs no less than a larger one is never taken.
    total : float
        Dense cost of the whole model. What it has beyond its dense sites can't be pruned.
    gone : float
        Cost that the model had before and that no longer is in ``total``, such as that of tokens.
    """

    by_count: Mapping[str, Sequence[float]]
    total: float
    gone: float = 0.0

    @classmethod
    def of(
        cls, at: Sequence[Site], budget: Budget, total: float | None = None, gone: float = 0.0
    ) -> Costs:
        """Return costs that are proportional to units; ``total`` is from :func:`total_cost`."""
        if budget.of == "latency" or (total is None and budget.of != "prunable"):
            raise InputError(
                f"allocate: a budget of {budget.of} needs total=total_cost(...), or of latency "
                "costs=, which measure_latency measures"
            )
        by_count = {}
        for site in at:
            cost = _unit_cost(site, budget)
            by_count[site.name] = [cost * count for count in range(site.units + 1)]
        if total is None:
            total = sum(by_count[site.name][-1] for site in at)
        return cls(by_count, total, gone)

    @classmethod
    def measured(cls, table: LatencyTable, at: Sequence[Site]) -> Costs:
        """Return the seconds of sites, as a table of latency has them for their shapes."""
        rows = {row.shape: row for row in table.rows}
        by_count = {}
        for site in at:
            row = rows.get(site.shape)
            if row is None:
                raise InputError(
                    f"latency: the table has no sizes of {site.name}, with {site.units} "
                    f"{site.unit}s of {site.width} features; measure this model"
                )
            found = row.by_count()
            # What a whole plan saves, measured, by the sum of what its sites save.
            saved = (table.scale * (found[-1] - each) for each in found)
            by_count[site.name] = [max(0.0, found[-1] - each) for each in saved]
        return cls(by_count, table.total)

    def check(self, at: Sequence[Site]) -> None:
        """Raise InputError unless every site has a cost of at least 0 for every count."""
        if not 0.0 <= self.total < math.inf:
            raise InputError(f"allocate: the total cost must be at least 0, got {self.total}")
        for site in at:
            costs = self.by_count.get(site.name, ())
            known = all(0.0 <= cost < math.inf for cost in costs)
            if len(costs) != site.units + 1 or not known:
                raise InputError(
                    f"allocate: costs must have {site.units + 1} finite values of at least 0 for "
                    f"{site.name}, from 0 units kept to all, got {len(costs)}; measure this "
                    "model's own sites"
                )

    def kept_fraction(self, plan: Plan) -> float:
        """Return the fraction of the model's dense cost that a plan keeps."""
        costs = ((self.by_count[name], site) for name, site in plan.sites.items())
        removed = sum(each[s.units] - each[len(s.kept)] for each, s in costs)
        return (self.total - removed) / (self.total + self.gone)


def total_cost(model: nn.Module, at: Sequence[Site], budget: Budget) -> float:
    """Return the dense cost of the whole model in the unit of ``budget``; not of latency.

    ``flops`` are those of one forward pass over ``seq_len`` tokens: 2 per weight of every linear
    layer and token, and the two attention products; of experts, those that a token is sent to.
    """
    if budget.of == "prunable":
        return sum(site.params for site in at)
    if budget.of == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    if budget.of == "kv_cache":
        total, why = sum(cached_values(site) for site in sites(model, ["attn"])), ""
        if not predicts_next_token(model):
            why = "the model doesn't generate"
        elif any(site.keys_stay for site in at):
            why = "heads leave keys and values behind; prune groups with attn_unit='kv_group'"
        elif not total:
            why = "the cache holds what all heads make their keys and values from"
        if why:
            raise InputError(
                f"allocate: kv_cache is no budget of this {type(model).__name__}, as {why}; use "
                "of='params' or of='flops'"
            )
        return total
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) or is_transposed(module)
    )
    # Experts are no linear layers: they are counted whether they may be pruned or not.
    names = {site.name for site in at}
    experts = [s for s in sites(model) if s.expert is not None and s.name not in names]
    in_sites = sum(site.units * site.unit_flops(budget.seq_len) for site in (*at, *experts))
    # Biases are some thousandths of it.
    weights_in_sites = sum(site.params for site in at if site.expert is None)
    return in_sites + 2.0 * budget.seq_len * max(0, linear - weights_in_sites)


def cached_values(site: Site) -> int:
    """Return the numbers that generation keeps of a token for a site: keys and values.

    None where they are made anew from what all heads share, or where heads keep a state.
    """
    stacks = site.wiring.stacked.values()
    own = bool(site.wiring.key_value) or any(stack.shared for stack in stacks)
    return 2 * site.kv_heads * site.head_dim if own and not site.key_dim else 0


def _unit_cost(site: Site, budget: Budget) -> float:
    if budget.of == "flops":
        return float(site.unit_flops(budget.seq_len))
    if budget.of == "kv_cache":
        # Query heads share what is cached, where a group of them has one key and value.
        return cached_values(site) / site.units if not site.keys_stay else 0.0
    return float(site.unit_params)


def choose(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], limit: float
) -> list[int]:
    """Minimise ``Σ losses[i][choice_i]`` subject to ``Σ costs[i][choice_i] ≤ limit``.

    Dynamic programming: ``best[c]`` is the least loss of the lists so far at a cost of at most c
    grains beyond that of the first options, which must fit. If all costs are whole numbers, the
    grain is their greatest common divisor, and the result exact, as long as the rest of the limit
    holds at most ``MAX_GRAINS`` of them. Else it is that rest divided by ``MAX_GRAINS``, and the
    loss at most the least one of a limit that is lower by a grain per list.

    ``costs`` ascend strictly in each list. Returns the index of the option taken, by list.
    """
    extra = [[cost - options[0] for cost in options] for options in costs]
    room = min(limit - sum(options[0] for options in costs), sum(each[-1] for each in extra))
    if room <= 0:
        return [0] * len(costs)
    costs_of_all = [cost for each in extra for cost in each]
    whole = all(float(cost).is_integer() for cost in costs_of_all)
    grain = float(math.gcd(*map(int, costs_of_all))) if whole else 0.0
    if room > MAX_GRAINS * grain:
        grain = room / MAX_GRAINS
    grains = int(room / grain + 1e-6)
    steps = [[math.ceil(cost / grain - 1e-6) for cost in each] for each in extra]

    best, choices = np.zeros(grains + 1), []
    for spent, lost in zip(steps, losses, strict=True):
        better = np.full(grains + 1, np.inf)
        choice = np.zeros(grains + 1, dtype=np.int32)
        for option, (step, loss) in enumerate(zip(spent, lost, strict=True)):
            if step > grains:
                break
            total = best[: grains + 1 - step] + loss
            wins = total < better[step:]
            better[step:][wins] = total[wins]
            choice[step:][wins] = option
        best = better
        choices.append(choice)

    taken = []
    for spent, choice in zip(reversed(steps), reversed(choices), strict=True):
        taken.append(int(choice[grains]))
        grains -= spent[taken[-1]]
    return taken[::-1]
