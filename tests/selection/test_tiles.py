"""Allocation on the grid of a tile: which counts there are, and that the best of them are found."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

import pytest
import torch
from covers import some
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import tiny

from liar_ext import Budget, InputError, allocate, sites
from liar_ext.models.plan import AUTO_TILE, LEAST_STEPS
from liar_ext.models.slicing import allowed_counts, site_step
from liar_ext.selection.allocation import check_budget, probe_plan
from liar_ext.selection.costs import Costs
from liar_ext.selection.error_curves import predict_divergence, rounding

ATTN, MLP = sites(tiny("llama"))[:2]
METHODS = ("uniform", "global", "curve")


def site(block: int, units: int, params: int = 3, kind: str = "mlp"):
    """Return a site of so many channels, or heads."""
    like = MLP if kind == "mlp" else ATTN
    sizes = {"units": units, "d_in": units * like.width, "unit_params": params}
    return replace(like, name=f"{block}.{kind}", block=block, **sizes)


def scores_and_losses(at, seed=0):
    """Random scores, and rising losses that are convex nowhere in particular."""
    generator = torch.Generator().manual_seed(seed)
    scores = {s.name: torch.rand(s.units, generator=generator).double() for s in at}
    losses = {}
    for s in at:
        steps = torch.rand(s.units, generator=generator).double() ** 3
        losses[s.name] = torch.cat([torch.zeros(1), steps.cumsum(0)]).double()
    return scores, losses


@pytest.mark.parametrize(
    ("units", "tile", "step"),
    [
        (1536, "auto", 32),
        (256, "auto", 32),  # eight steps
        (255, "auto", 16),
        (48, "auto", 4),
        (24, "auto", 2),
        (9, "auto", 1),
        (3, "auto", 1),
        (1297, "auto", 32),
        (24, 128, 128),
        (24, 7, 7),
    ],
)
def test_the_step_of_a_size(units, tile, step):
    assert site_step(site(0, units), Budget(0.5, tile=tile)) == step


@given(st.integers(1, 5000), st.sampled_from([1, 2, 9, 12, 64]))
def test_an_automatic_step_is_the_largest_with_enough_steps(groups, base):
    size = groups * base
    step = Budget(0.5).step(size, base)
    assert step % base == 0 and base <= step
    tiles = [2**i for i in range(AUTO_TILE.bit_length())]
    fitting = [torch.tensor([base, tile]) for tile in tiles]
    steps = [int(torch.lcm(*pair)) for pair in fitting]
    fitting = [each for each in steps if LEAST_STEPS * each <= size]
    assert step == max(fitting, default=base)


def test_heads_stay_whole_whatever_the_tile():
    for tile in (1, 32, 128):
        assert allowed_counts(ATTN, Budget(0.5, tile=tile)) == (1, 2, 3, 4)


def test_a_tile_that_a_layer_has_no_multiple_of_leaves_it_whole():
    assert allowed_counts(site(0, 24), Budget(0.5, tile=128)) == (24,)
    assert allowed_counts(site(0, 130), Budget(0.5, tile=64)) == (64, 128, 130)
    said = "tile=128 .* can go down to 1; raise keep=0.5, or lower tile=128"
    with pytest.raises(InputError, match=said):
        check_budget([site(0, 24)], Budget(0.5, tile=128))


JOBS = st.tuples(
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.sampled_from(["auto", 1, 2, 7, 16, 32, 64, 128]),
    st.floats(0.03, 1.0),
    st.integers(0, 99),
)


@pytest.mark.parametrize("method", METHODS)
@given(JOBS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_counts_lie_on_the_grid_and_use_the_budget(method, job, uniform_layers):
    """Nasty widths; no step of any layer, or of all equal ones, would still fit in what is left."""
    widths, tile, keep, seed = job
    at = [site(i, units) for i, units in enumerate(widths)]
    at += [site(i, 4, 50, "attn") for i in range(2)]
    scores, losses = scores_and_losses(at, seed)
    budget = Budget(keep, tile=tile, uniform_layers=uniform_layers)
    dense = sum(s.params for s in at)
    try:
        check_budget(at, budget)
    except InputError:
        least = sum(s.unit_params * allowed_counts(s, budget)[0] for s in at)
        assert least > keep * dense
        return
    plan = allocate(at, scores, budget, method, losses=losses)
    counts = {s.name: len(plan.sites[s.name].kept) for s in at}
    left = keep * dense * (1 + 1e-9) - sum(s.unit_params * counts[s.name] for s in at)
    assert left >= 0
    for s in at:
        assert counts[s.name] in allowed_counts(s, budget)
        assert counts[s.name] == s.units or counts[s.name] % site_step(s, budget) == 0
    if method == "uniform":
        return
    for kind in {(s.kind, s.units) for s in at}:
        team = [s for s in at if (s.kind, s.units) == kind]
        teams = [team] if uniform_layers else [[s] for s in team]
        for alike in teams:
            assert len({counts[s.name] for s in alike}) == 1
            higher = [n for n in allowed_counts(alike[0], budget) if n > counts[alike[0].name]]
            if higher:
                more = higher[0] - counts[alike[0].name]
                assert more * sum(s.unit_params for s in alike) > left


@pytest.mark.parametrize("tile", ["auto", 1, 4, 7, 16])
@pytest.mark.parametrize("keep", [0.4, 0.5, 0.8, 0.99])
@some("seed", range(3), 0)
def test_curve_on_the_grid_is_the_best_of_all_counts(seed, keep, tile):
    at = [site(0, 40, 3), site(1, 33, 5), site(2, 17, 2), site(0, 4, 60, "attn")]
    scores, losses = scores_and_losses(at, seed)
    budget = Budget(keep, tile=tile)
    limit = keep * sum(s.params for s in at)
    least = min(
        sum(float(losses[s.name][s.units - n]) for s, n in zip(at, counts, strict=True))
        for counts in itertools.product(*(allowed_counts(s, budget) for s in at))
        if sum(s.unit_params * n for s, n in zip(at, counts, strict=True)) <= limit + 1e-9
    )
    plan = allocate(at, scores, budget, "curve", losses=losses)
    assert predict_divergence(losses, plan) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("tile", ["auto", 4, 7])
@pytest.mark.parametrize("keep", [0.4, 0.7, 0.95])
def test_global_on_the_grid_takes_tiles_by_their_mean(keep, tile):
    """By hand: from the least counts, always the tile of the highest mean that still fits."""
    at = [site(0, 40), site(1, 33), site(2, 24)]
    scores, _ = scores_and_losses(at, 3)
    budget = Budget(keep, tile=tile)
    ranked, counts, race = {}, {}, []
    for s in at:
        values = scores[s.name]
        standard = (values - values.mean()) / values.std(unbiased=False)
        ranked[s.name] = standard.sort(descending=True).values
        counts[s.name] = allowed_counts(s, budget)[0]

    def enter(s):
        for then in allowed_counts(s, budget):
            if then > counts[s.name]:
                mean = float(ranked[s.name][counts[s.name] : then].mean())
                heapq.heappush(race, (-mean, s.name, then, s))
                return

    left = keep * sum(s.params for s in at) - sum(s.unit_params * counts[s.name] for s in at)
    for s in at:
        enter(s)
    while race:
        _, name, then, s = heapq.heappop(race)
        price = (then - counts[name]) * s.unit_params
        if price <= left + 1e-9:
            left, counts[name] = left - price, then
            enter(s)
    plan = allocate(at, scores, budget, "global")
    assert {s.name: len(plan.sites[s.name].kept) for s in at} == counts


@given(st.integers(0, 99), st.sampled_from([1, 2, 4, 8]), st.floats(0.3, 0.9), st.floats(0, 0.1))
@settings(max_examples=40, deadline=None)
def test_curve_loses_no_less_with_a_coarser_tile_or_a_smaller_budget(seed, tile, keep, more):
    at = [site(0, 64), site(1, 48), site(0, 4, 60, "attn")]
    scores, losses = scores_and_losses(at, seed)

    def lost(keep, tile):
        plan = allocate(at, scores, Budget(keep, tile=tile), "curve", losses=losses)
        return predict_divergence(losses, plan)

    assert lost(keep, tile) <= lost(keep, 2 * tile) + 1e-12
    assert lost(keep + more, tile) <= lost(keep, tile) + 1e-12


@pytest.mark.parametrize("tile", ["auto", 16, 32])
def test_uniform_gives_every_layer_the_same_multiple(tile):
    at = [site(i, 512) for i in range(4)] + [site(i, 3, 9000, "attn") for i in range(4)]
    scores, _ = scores_and_losses(at)
    for keep in (0.5, 0.73, 0.99):
        plan = allocate(at, scores, Budget(keep, tile=tile), "uniform")
        (kept,) = {len(plan.sites[f"{i}.mlp"].kept) for i in range(4)}
        assert kept == 512 or kept % (32 if tile == "auto" else tile) == 0
        # One step more in all layers would not fit: as near as the grid allows.
        step = 0 if kept == 512 else 4 * 3 * (32 if tile == "auto" else tile)
        fraction = Costs.of(at, Budget(keep)).kept_fraction(plan)
        assert fraction <= keep + 1e-9
        assert not step or fraction + step / sum(s.params for s in at) > keep


def test_what_is_measured_does_not_depend_on_the_tile():
    at = [site(0, 40), site(0, 4, 60, "attn")]
    scores, _ = scores_and_losses(at)
    plans = [probe_plan(at, scores, Budget(0.7, tile=tile)) for tile in (1, "auto", 128)]
    assert len({str(plan.sites) for plan in plans}) == 1
    assert all(site_plan.removed for site_plan in plans[0].sites.values())


def facts_of(at, budget, method="curve"):
    scores, losses = scores_and_losses(at)
    plan = allocate(at, scores, budget, method, losses=losses)
    costs = Costs.of(at, budget)
    return plan, losses, rounding(at, scores, budget, method, plan, costs=costs, losses=losses)


def test_the_cost_of_rounding_is_that_of_both_allocations():
    at = [site(0, 40, 3), site(1, 33, 5)]
    plan, losses, facts = facts_of(at, Budget(0.6, tile=16))
    assert facts["predicted_divergence"] == predict_divergence(losses, plan)
    single, _, finest = facts_of(at, Budget(0.6, tile=1))
    assert facts["predicted_divergence_at_tile_1"] == predict_divergence(losses, single)
    assert facts["predicted_divergence_at_tile_1"] < facts["predicted_divergence"]
    assert facts["kept"] <= facts["kept_at_tile_1"] <= 0.6 + 1e-9
    assert finest["predicted_divergence"] == finest["predicted_divergence_at_tile_1"]
    assert finest["kept"] == finest["kept_at_tile_1"] == facts["kept_at_tile_1"]
    assert [row["step"] for row in facts["sites"]] == [16, 16] and facts["tile"] == 16


@pytest.mark.parametrize("method", ["uniform", "global"])
def test_methods_without_a_loss_say_so(method):
    _, _, facts = facts_of([site(0, 40)], Budget(0.6, tile=16), method)
    assert facts["objective"].startswith("none that is a loss")
    assert "predicted_divergence" not in facts
    assert facts["kept"] == pytest.approx(0.4)
    assert facts["kept_at_tile_1"] == pytest.approx(0.6)


def test_layers_that_a_grid_does_not_suit_are_named():
    at = [site(0, 24), site(1, 130), site(2, 512), site(0, 4, 60, "attn")]
    _, _, facts = facts_of(at, Budget(0.6))
    assert any("24 channels, fewer than 8 tiles of 32" in note for note in facts["notes"])
    assert any("steps of 16" in note for note in facts["notes"]) and not facts["warnings"]
    assert not any("512" in note for note in facts["notes"])
    _, _, facts = facts_of(at, Budget(0.99, tile=64))
    assert any("all of their 130 channels, which is no multiple" in n for n in facts["notes"])
    (warning,) = facts["warnings"]
    assert "keep all of their 24 channels" in warning and "tile=64" in warning


@given(JOBS)
@settings(max_examples=30, deadline=None)
def test_the_kept_fraction_is_that_of_the_parameters(job):
    widths, tile, keep, seed = job
    at = [site(i, units) for i, units in enumerate(widths)]
    scores, losses = scores_and_losses(at, seed)
    budget = Budget(keep, tile=tile)
    try:
        plan = allocate(at, scores, budget, "curve", losses=losses)
    except InputError:
        assume(False)
    kept = sum(len(plan.sites[s.name].kept) * s.unit_params for s in at)
    dense = sum(s.params for s in at)
    assert Costs.of(at, budget).kept_fraction(plan) == pytest.approx(kept / dense)
    # The sites as half of a model: what they don't hold stays.
    assert Costs.of(at, budget, 2.0 * dense).kept_fraction(plan) == pytest.approx(
        0.5 + kept / dense / 2
    )
