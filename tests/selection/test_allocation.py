from __future__ import annotations

import itertools

import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import Budget, InputError, allocate, calibrate, error_curves, prune, score, sites
from liar_ext.selection.allocation import check_budget, probe_plan, select
from liar_ext.selection.costs import Costs, total_cost


@pytest.fixture(scope="module")
def llama():
    model = tiny("llama")
    at = sites(model)
    generator = torch.Generator().manual_seed(5)
    scores = {s.name: torch.rand(s.units, generator=generator).double() for s in at}
    return model, at, scores


@pytest.fixture(scope="module")
def losses(llama):
    """Rising curves that are convex nowhere in particular, with a dip as held-out errors have."""
    generator = torch.Generator().manual_seed(6)
    curves = {}
    for site in llama[1]:
        curve = torch.rand(site.units + 1, generator=generator).double().cumsum(0)
        curve[site.units // 2] -= 0.7
        curves[site.name] = (curve - curve[0]) * torch.rand(1, generator=generator).double()
    return curves


def kept_cost(plan, at, budget, total):
    cost = {
        s.name: s.unit_flops(budget.seq_len) if budget.of == "flops" else s.unit_params for s in at
    }
    removed = sum(len(plan.sites[s.name].removed) * cost[s.name] for s in at)
    return (total - removed) / total


@pytest.mark.parametrize("method", ["uniform", "global", "curve"])
@pytest.mark.parametrize("of", ["prunable", "params", "flops"])
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9, 1.0])
def test_budget_is_met_and_used(llama, losses, method, of, keep):
    model, at, scores = llama
    budget = Budget(keep, of, seq_len=16)
    total = total_cost(model, at, budget)
    plan = allocate(at, scores, budget, method, total=total, losses=losses)
    kept = kept_cost(plan, at, budget, total)
    coarsest = max(s.unit_flops(16) if of == "flops" else s.unit_params for s in at)
    mlps = sum(s.kind == "mlp" for s in at)
    assert kept <= keep + 1e-9
    assert kept > keep - (coarsest + mlps * at[1].unit_params) / total
    if keep == 1.0:
        assert all(not site_plan.removed for site_plan in plan.sites.values())


def test_uniform_keeps_the_same_fraction_everywhere(llama):
    _, at, scores = llama
    plan = allocate(at, scores, Budget(0.7), "uniform")
    for kind in ("attn", "mlp"):
        assert len({len(plan.sites[s.name].kept) for s in at if s.kind == kind}) == 1


@pytest.mark.parametrize(
    "keep, heads, channels",
    [
        (0.3, 1, 8),
        (0.31, 1, 9),
        (0.4, 2, 6),
        (0.5, 2, 12),
        (0.7, 3, 15),
        (0.75, 3, 18),
        (0.8, 4, 12),
    ],
)
def test_uniform_rounds_heads_up_unless_channels_starve(llama, keep, heads, channels):
    """A head has 960 parameters and a channel 120; a layer has 4 and 24, so 6,720 in all."""
    _, at, scores = llama
    plan = allocate(at, scores, Budget(keep, tile=1), "uniform")
    kept = [len(plan.sites[site.name].kept) for site in at]
    assert kept == [heads, channels] * (len(at) // 2)
    assert heads * 960 + channels * 120 <= keep * 6720


def test_global_equals_brute_force_order(llama):
    """FLAP's rule by hand: standardise per site, sort all units, keep from the top."""
    _, at, scores = llama
    mlps = [site for site in at if site.kind == "mlp"]
    plan = allocate(mlps, scores, Budget(0.6, tile=1), "global")
    units = []
    for site in mlps:
        values = scores[site.name]
        standard = (values - values.mean()) / values.std(unbiased=False)
        first = int(values.argmax())
        units += [(float(z), site.name, u) for u, z in enumerate(standard) if u != first]
    room = int(0.6 * sum(site.units for site in mlps)) - len(mlps)
    expected = sorted(units, reverse=True)[:room]
    kept = {(s.name, u) for s in mlps for u in plan.sites[s.name].kept}
    assert kept >= {(name, u) for _, name, u in expected}
    assert len(kept) == room + len(mlps)


def features_of(at, seed=7):
    """Scores of features with a tail, as variances have."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.d_in, generator=generator).double() ** 4 for s in at}


def flap(at, features, keep):
    """FLAP unit by unit: square, standardise the features, average, keep from the top."""
    queue = []
    for site in at:
        power = 2 if site.kind == "attn" else 1
        metric = [float(value) ** power for value in features[site.name]]
        mean = sum(metric) / len(metric)
        spread = (sum((value - mean) ** 2 for value in metric) / len(metric)) ** 0.5
        for unit in range(site.units):
            own = metric[unit * site.width : (unit + 1) * site.width]
            value = sum((each - mean) / spread for each in own) / site.width
            queue.append((value, site, unit))
    queue.sort(key=lambda entry: -entry[0])
    left = keep * sum(site.params for site in at) + 1e-6
    firsts = {}
    for _, site, unit in queue:
        firsts.setdefault(site.name, unit)
    left -= sum(site.unit_params for site in at)
    kept, closed = {(name, unit) for name, unit in firsts.items()}, set()
    for _, site, unit in queue:
        if (site.name, unit) in kept or site.name in closed:
            continue
        if site.unit_params <= left:
            left -= site.unit_params
            kept.add((site.name, unit))
        else:
            closed.add(site.name)
    return kept


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8, 0.95])
def test_global_of_features_is_flaps(llama, keep, seed):
    _, at, _ = llama
    features = features_of(at, seed)
    plan = allocate(at, features, Budget(keep, tile=1), "global")
    found = {(name, unit) for name, site in plan.sites.items() for unit in site.kept}
    assert found == flap(at, features, keep)


def test_global_by_hand(llama):
    """A head has the mean of its standardised squares, a channel its own standardised score."""
    at = llama[1][:2]
    attn, mlp = at
    # Squares 0 and 4 by halves of every group but the last, which has all 1: mean 2 or 1, so that
    # over 32 features μ = 1.75, σ² = 3.1875; the groups stand at 0.14, the last at -0.42.
    values = torch.tensor([0.0, 2.0], dtype=torch.float64).repeat(16)
    values[24:] = 1.0
    # Channels at ±1: half of them go before the last group, and none before the other groups.
    channels = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(12)
    scores = {attn.name: values, mlp.name: channels}
    dense = sum(site.params for site in at)
    low = 12 * mlp.unit_params
    for gone, kept_attn, kept_mlp in (
        (low, (0, 1, 2, 3), tuple(range(1, 24, 2))),
        (low + attn.unit_params, (0, 1, 2), tuple(range(1, 24, 2))),
        (low + 3 * attn.unit_params, (0,), tuple(range(1, 24, 2))),
    ):
        plan = allocate(at, scores, Budget(1 - gone / dense), "global")
        assert plan.sites[attn.name].kept == kept_attn
        assert plan.sites[mlp.name].kept == kept_mlp
    # Standardised by the unit instead, the last group stands at -1.7 and goes first.
    units = {site.name: site.per_unit(scores[site.name].square()) for site in at}
    plan = allocate(at, units, Budget(1 - attn.unit_params / dense), "global")
    assert plan.sites[attn.name].kept == (0, 1, 2) and not plan.sites[mlp.name].removed


def test_global_chooses_heads_by_their_squares(llama):
    attn = llama[1][0]
    values = torch.zeros(attn.d_in, dtype=torch.float64)
    values[0] = 3.0  # squares sum to 9
    values[attn.width :] = 1.0  # to 8 each, the sum being larger
    at = [attn]
    budget = Budget(1 / attn.units)
    assert allocate(at, {attn.name: values}, budget, "global").sites[attn.name].kept == (0,)
    assert allocate(at, {attn.name: values}, budget, "uniform").sites[attn.name].kept == (1,)
    # A square does not turn the order of scores below zero.
    assert allocate(at, {attn.name: -values}, budget, "global").sites[attn.name].kept == (1,)


def test_global_does_not_feel_the_scale_of_a_site(llama):
    _, at, _ = llama
    features = features_of(at)
    scaled = {name: values * 2.0 ** (i - 3) for i, (name, values) in enumerate(features.items())}
    plans = [allocate(at, each, Budget(0.7), "global") for each in (features, scaled)]
    assert plans[0] == plans[1]


def test_query_heads_stand_by_what_each_group_loses(llama):
    """Its weakest head each; two strong heads of one group save no head of another."""
    at = sites(llama[0], ["attn"], "head")[:2]
    assert (at[0].units, at[0].groups) == (8, 4)
    # The first site: in every group a strong and a weak head. The second: two strong groups.
    strong = {at[0].name: [9, 0] * 4, at[1].name: [9, 9, 9, 9, 0, 0, 0, 0]}
    scores = {name: torch.tensor(values).double() for name, values in strong.items()}
    plan = allocate(at, scores, Budget(0.75), "global")
    assert [len(plan.sites[site.name].kept) for site in at] == [4, 8]


def test_scores_of_features_serve_wherever_those_of_units_do(llama, losses):
    model, at, _ = llama
    features = features_of(at)
    units = {site.name: site.per_unit(features[site.name]) for site in at}
    for method in ("uniform", "curve"):
        plans = [allocate(at, s, Budget(0.7), method, losses=losses) for s in (features, units)]
        assert plans[0] == plans[1]
    assert probe_plan(at, features, Budget(0.7)) == probe_plan(at, units, Budget(0.7))
    bank = calibrate(model, [tiny_inputs(model, batch=8, seed=seed) for seed in range(2)], at)
    one, other = (error_curves(model, bank, at, scores) for scores in (features, units))
    assert all(torch.equal(one[site.name], other[site.name]) for site in at)


def test_prune_allocates_as_flap_does():
    model = tiny("llama")
    batches = [tiny_inputs(model, batch=8, seed=seed) for seed in range(3)]
    at = sites(model)
    bank = calibrate(model, batches, at)
    by_feature, by_unit = (
        allocate(at, score(model, bank, at, "wifv", per=per), Budget(0.7), "global").sites
        for per in ("feature", "unit")
    )
    report = prune(model, batches, 0.7, criterion="wifv", allocation="global", reconstruct="none")
    assert report.plan.sites == by_feature != by_unit


@pytest.mark.parametrize("uniform_layers", [False, True])
@pytest.mark.parametrize("of", ["prunable", "flops"])
@pytest.mark.parametrize("keep", [0.6, 0.75, 0.9])
def test_curve_equals_brute_force(llama, losses, of, keep, uniform_layers):
    """Every combination of counts of two blocks' sites, attention against MLP."""
    model, at, scores = llama
    at = [site for site in at if site.block < 2]
    budget = Budget(keep, of, tile=4, uniform_layers=uniform_layers, seq_len=16)
    cost = {s.name: s.unit_flops(16) if of == "flops" else s.unit_params for s in at}
    dense = sum(cost[s.name] * s.units for s in at)
    total = total_cost(model, at, budget)
    rising = {name: curve.cummax(0).values for name, curve in losses.items()}
    steps = [[n for n in range(1, s.units + 1) if s.kind == "attn" or n % 4 == 0] for s in at]
    least = float("inf")
    for counts in itertools.product(*steps):
        named = dict(zip((s.name for s in at), counts, strict=True))
        equal = all(len({named[f"{b}.{kind}"] for b in (0, 1)}) == 1 for kind in ("attn", "mlp"))
        spent = total - dense + sum(cost[name] * count for name, count in named.items())
        if spent <= keep * total and (equal or not uniform_layers):
            lost = sum(float(rising[s.name][s.units - named[s.name]]) for s in at)
            least = min(least, lost)
    plan = allocate(at, scores, budget, "curve", total=total, losses=losses)
    lost = sum(float(rising[s.name][len(plan.sites[s.name].removed)]) for s in at)
    assert lost == pytest.approx(least, abs=1e-12)


def test_probe_plans_take_something_off_every_site(llama):
    _, at, scores = llama
    for keep, tile in itertools.product((0.5, 0.8, 0.99, 1.0), (1, 8)):
        plan = probe_plan(at, scores, Budget(keep, tile=tile))
        for site in at:
            kept = plan.sites[site.name].kept
            assert 0 < len(kept) < site.units and len(kept) <= max(1, keep * site.units)


def test_constraints_hold(llama, losses):
    model, at, scores = llama
    for method, tile in itertools.product(("uniform", "global", "curve"), (1, 4, 8)):
        budget = Budget(0.6, tile=tile, uniform_layers=True)
        plan = allocate(at, scores, budget, method, losses=losses)
        for site in at:
            kept = len(plan.sites[site.name].kept)
            assert kept == site.units or site.kind == "attn" or kept % tile == 0
        for kind in ("attn", "mlp"):
            assert len({len(plan.sites[s.name].kept) for s in at if s.kind == kind}) == 1


def test_query_heads_leave_every_group_equally(llama):
    model, _, _ = llama
    at = sites(model, ["attn"], "head")
    scores = {s.name: torch.arange(s.units).double() for s in at}
    plan = allocate(at, scores, Budget(0.5), "global")
    assert plan.sites["0.attn"].kept == (1, 3, 5, 7)


def test_budget_that_no_plan_meets(llama):
    model, at, scores = llama
    with pytest.raises(InputError, match="no plan keeps 0.01 of prunable: .* can go down to 0"):
        allocate(at, scores, Budget(0.01), "uniform")
    budget = Budget(0.1, "params")
    with pytest.raises(InputError, match="no plan keeps 0.1 of params.*remove tokens"):
        costs = Costs.of(at, budget, total_cost(model, at, budget))
        check_budget(at, budget, "global", costs)
    with pytest.raises(InputError, match="needs total=total_cost"):
        allocate(at, scores, Budget(0.5, "params"))
    with pytest.raises(InputError, match="method must be one of uniform, global, curve"):
        allocate(at, scores, Budget(0.5), "best")
    with pytest.raises(InputError, match="method curve needs losses"):
        allocate(at, scores, Budget(0.5), "curve")


def test_flops_of_a_model_equal_counted_ones():
    """Against torch's own counter, which sees every matrix product of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("llama", attn_implementation="eager")
    budget = Budget(0.5, "flops", seq_len=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, 16)), use_cache=False)
    rotary = 2 * 16 * (model.config.head_dim // 2)  # positions times frequencies
    counted = counter.get_total_flops() - rotary
    assert total_cost(model, sites(model), budget) == pytest.approx(counted, rel=0.01)


def test_select_breaks_ties_by_index():
    assert select(torch.zeros(5), 3) == (0, 1, 2)
    assert select(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == (1, 3)
    assert select(torch.tensor([9.0, 8.0, 1.0, 2.0]), 2, groups=2) == (0, 3)


def test_values_that_are_not_those_of_the_sites_are_refused(llama, losses):
    _, at, scores = llama
    first, budget = at[0].name, Budget(0.5, "prunable")

    def refused(said, at=at, scores=scores, budget=budget, method="curve", **more):
        with pytest.raises(InputError, match=said):
            allocate(at, scores, budget, method, **{"losses": losses, **more})

    refused("there is no site", at=[])
    refused("scores are missing for 0.attn, 0.mlp", scores={})
    refused("losses are missing for 0.mlp", losses={first: losses[first]})
    refused("losses must be 5 finite numbers for 0.attn, got 4", losses={**losses, **scores})
    for values, name in ((scores, "scores"), (losses, "losses")):
        damaged = {**values, first: values[first] * torch.nan}
        refused(f"{name} must be .* finite numbers for 0.attn", **{name: damaged})
    refused("the total cost must be at least 0, got nan", budget=Budget(0.5), total=float("nan"))
