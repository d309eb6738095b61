"""Costs that are not proportional to units: made-up seconds, and what generation caches."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import asdict

import pytest
import torch
from tiny import tiny

from liar_ext import Budget, Costs, InputError, allocate, prune, sites
from liar_ext.models.plan import BUDGET_UNITS
from liar_ext.models.slicing import allowed_counts
from liar_ext.selection.allocation import check_budget, even_plan
from liar_ext.selection.costs import MAX_GRAINS, choose, total_cost

METHODS = ("uniform", "global", "curve")
SHAPES = ("concave", "steps", "noisy", "flat", "free")


@pytest.fixture(scope="module")
def llama():
    model = tiny("llama")
    return model, sites(model)


def seconds(shape, units, draw):
    """Costs by count of one site: of shapes that hardware has, or noise makes."""
    scale = draw.uniform(1e-4, 1e-3)
    if shape == "concave":
        return [0.0, *(scale * (0.3 + 0.7 * math.sqrt(k / units)) for k in range(1, units + 1))]
    if shape == "steps":
        return [scale * math.ceil(4 * k / units) for k in range(units + 1)]
    if shape == "noisy":
        return [scale * (k / units + draw.uniform(0, 0.3)) for k in range(units + 1)]
    return [scale if shape == "flat" else 0.0] * (units + 1)


def problem(at, seed, shapes=SHAPES):
    """Costs, losses and scores of sites."""
    draw = random.Random(seed)
    by_count = {site.name: seconds(draw.choice(shapes), site.units, draw) for site in at}
    fixed = draw.uniform(0.0, 1e-3)
    total = fixed + sum(costs[-1] for costs in by_count.values())
    losses, scores = {}, {}
    for site in at:
        steps = torch.tensor([0.0] + [draw.random() ** 3 for _ in range(site.units)])
        losses[site.name] = steps.double().cumsum(0)
        scores[site.name] = torch.tensor([draw.random() for _ in range(site.units)])
    return Costs(by_count, total), losses, scores


def cost_of(costs, counts):
    return sum(costs.by_count[name][count] for name, count in counts.items())


def counts_of(plan):
    return {name: len(site.kept) for name, site in plan.sites.items()}


def reachable(at, costs, budget):
    """The least fraction that counts of the grid reach."""
    least = sum(min(costs.by_count[s.name][k] for k in allowed_counts(s, budget)) for s in at)
    in_sites = sum(costs.by_count[site.name][-1] for site in at)
    return (costs.total - in_sites + least) / costs.total


@pytest.mark.parametrize("uniform_layers", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(12))
def test_plans_meet_a_budget_of_any_costs(llama, method, seed, uniform_layers):
    _, at = llama
    costs, losses, scores = problem(at, seed)
    loose = Budget(1.0, "latency", tile=4, uniform_layers=uniform_layers)
    least = 0.0
    if not uniform_layers:
        least = reachable(at, costs, loose)
    for keep in (0.6, 0.8, 0.95, 1.0):
        budget = Budget(keep, "latency", tile=4, uniform_layers=uniform_layers)
        if uniform_layers:
            try:
                check_budget(at, budget, costs=costs)
            except InputError:
                continue
        elif least > keep:
            with pytest.raises(InputError, match="no plan keeps"):
                allocate(at, scores, budget, method, losses=losses, costs=costs)
            continue
        plan = allocate(at, scores, budget, method, losses=losses, costs=costs)
        counts = counts_of(plan)
        spent = costs.total - sum(costs.by_count[s.name][-1] for s in at) + cost_of(costs, counts)
        assert spent <= (keep + 1e-6) * costs.total
        assert costs.kept_fraction(plan) == pytest.approx(spent / costs.total)
        if uniform_layers:
            for kind in ("attn", "mlp"):
                assert len({counts[s.name] for s in at if s.kind == kind}) == 1
        elif keep == 1.0 and method != "uniform":
            assert all(counts[s.name] == s.units for s in at)


@pytest.mark.parametrize("seed", range(30))
def test_curve_is_the_best_of_all_plans_within_its_bound(llama, seed):
    at = llama[1][:4]
    costs, losses, scores = problem(at, seed)
    keep = min(1.0, max(0.7, reachable(at, costs, Budget(1.0, tile=4)) + 0.05))
    budget = Budget(keep, "latency", tile=4)
    plan = allocate(at, scores, budget, "curve", losses=losses, costs=costs)
    in_sites = sum(costs.by_count[site.name][-1] for site in at)
    limit = budget.keep * costs.total - (costs.total - in_sites)

    def least(limit):
        found = math.inf
        for counts in itertools.product(*(allowed_counts(site, budget) for site in at)):
            named = {site.name: count for site, count in zip(at, counts, strict=True)}
            if cost_of(costs, named) <= limit:
                gone = sum(float(losses[s.name][s.units - named[s.name]]) for s in at)
                found = min(found, gone)
        return found

    counts = counts_of(plan)
    loss = sum(float(losses[site.name][site.units - counts[site.name]]) for site in at)
    assert least(limit + 1e-6 * costs.total) - 1e-12 <= loss
    assert loss <= least(limit - len(at) * limit / MAX_GRAINS) + 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_count_that_costs_as_much_as_a_larger_one_is_never_taken(llama, method):
    """Kernels that work in tiles of 8, whatever the tile of the budget is."""
    _, at = llama
    _, losses, scores = problem(at, 3)
    by_count = {s.name: [float(math.ceil(k / 8)) for k in range(s.units + 1)] for s in at}
    for site in at:
        if site.kind == "attn":
            by_count[site.name] = [0.1 * k for k in range(site.units + 1)]
    costs = Costs(by_count, sum(each[-1] for each in by_count.values()))
    budget = Budget(0.7, "latency", tile=1)
    counts = counts_of(allocate(at, scores, budget, method, losses=losses, costs=costs))
    assert all(counts[site.name] % 8 == 0 for site in at if site.kind == "mlp")
    assert any(counts[site.name] < site.units for site in at)


@pytest.mark.parametrize("of", ["prunable", "params", "flops"])
@pytest.mark.parametrize("method", METHODS)
def test_proportional_costs_are_those_of_a_total(llama, method, of):
    model, at = llama
    _, losses, scores = problem(at, 5)
    budget = Budget(0.7, of, seq_len=16)
    total = total_cost(model, at, budget)
    costs = Costs.of(at, budget, total)
    one = allocate(at, scores, budget, method, losses=losses, total=total)
    assert one == allocate(at, scores, budget, method, losses=losses, costs=costs)


def test_fractional_costs_of_the_knapsack():
    """Whole numbers are exact; the same in nanoseconds of a second is within the bound."""
    costs, losses = [[1, 4, 9], [2, 3, 7], [1, 5, 6]], [[5.0, 2.0, 0.0]] * 3
    exact = choose(costs, losses, 14)
    assert choose([[1e-9 * cost for cost in each] for each in costs], losses, 14.1e-9) == exact
    assert choose([[0.1, 0.5]], [[1.0, 0.0]], 0.1) == [0]
    assert choose([[0.0, 0.0]], [[1.0, 0.0]], 0.0) == [0]


def test_what_generation_caches():
    for name, unit, cached in (
        ("llama", "auto", 4 * 2 * 4),
        ("gpt2", "auto", 4 * 2 * 8),
        ("opt", "auto", 4 * 2 * 8),
    ):
        model = tiny(name)
        at = sites(model, ["attn"], unit)
        budget = Budget(0.5, "kv_cache")
        assert total_cost(model, at, budget) == len(at) * cached
        inputs = torch.randint(3, 50, (1, 7))
        with torch.no_grad():
            cache = model(inputs, use_cache=True)["past_key_values"]
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        assert sum(each.numel() for pair in layers for each in pair) == 7 * len(at) * cached


@pytest.mark.parametrize("method", METHODS)
def test_mlps_stay_whole_for_a_cache(llama, method):
    model, at = llama
    _, losses, scores = problem(at, 8)
    budget = Budget(0.5, "kv_cache")
    total = total_cost(model, at, budget)
    plan = allocate(at, scores, budget, method, losses=losses, total=total)
    kept = {
        kind: [len(plan.sites[s.name].kept) for s in at if s.kind == kind]
        for kind in ("attn", "mlp")
    }
    assert sum(kept["attn"]) == 6 and kept["mlp"] == [24, 24, 24]


def test_a_job_for_the_cache_prunes_attention_alone():
    model = tiny("llama")
    data = [{"input_ids": torch.randint(3, 50, (8, 16))} for _ in range(4)]
    report = prune(model, data, 0.5, of="kv_cache")
    assert {row.name.split(".")[1] for row in report.sites} == {"attn"}
    assert report.grid["kept"] == 0.5
    with torch.no_grad():
        cache = model(data[0]["input_ids"], use_cache=True)["past_key_values"]
    assert sum(layer.keys.shape[1] for layer in cache.layers) == 6


def test_caches_that_no_plan_makes_smaller_are_refused():
    data = [{"input_ids": torch.randint(3, 50, (8, 16))}]
    with pytest.raises(InputError, match="attn_unit='kv_group'"):
        prune(tiny("llama"), data, 0.5, of="kv_cache", attn_unit="head")
    with pytest.raises(InputError, match="doesn't generate; use"):
        prune(tiny("bert"), data, 0.5, of="kv_cache")
    with pytest.raises(InputError, match="spent on attention"):
        prune(tiny("llama"), data, 0.5, of="kv_cache", kinds=("mlp",))
    one = tiny("llama", num_key_value_heads=1)
    with pytest.raises(InputError, match="can go down to 1"):
        prune(one, data, 0.5, of="kv_cache")


def test_costs_that_are_none(llama):
    _, at = llama
    costs, _, scores = problem(at, 1)
    budget = Budget(0.9, "latency")
    with pytest.raises(InputError, match="of latency needs .*costs="):
        allocate(at, scores, budget)
    bad = ([value] * 25 for value in (-1.0, math.nan, math.inf))
    for wrong in ([], [0.0, 1.0, 2.0], *bad):
        given = {**costs.by_count, at[1].name: wrong}
        match = f"25 finite values of at least 0 for 0.mlp, .* got {len(wrong)}"
        with pytest.raises(InputError, match=match):
            allocate(at, scores, budget, costs=Costs(given, costs.total))


def test_an_unreachable_budget_says_what_lies_outside_of_the_sites(llama):
    _, at = llama
    by_count = {site.name: [1.0 * k for k in range(site.units + 1)] for site in at}
    in_sites = sum(each[-1] for each in by_count.values())
    costs = Costs(by_count, 4 * in_sites)
    with pytest.raises(InputError, match="no plan keeps 0.7 of latency.*0.75 lies outside of them"):
        even_plan(at, Budget(0.7, "latency"), costs)


def test_only_budgets_of_latency_record_its_settings():
    for of in BUDGET_UNITS:
        facts = Budget(0.5, of).to_dict()
        assert ("latency_batch" in facts) == (of == "latency")
        assert facts.items() <= asdict(Budget(0.5, of)).items()
