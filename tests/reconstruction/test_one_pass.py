from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import InputError, Moments, calibrate, reconstruct, sites
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.reconstruction.ridge import DAMP_LADDER, Residual, ratio
from liar_ext.reconstruction.solve import solve


def problem(tokens=400, d_in=24, d_out=9, seed=0, rank=None, offset=0.5):
    """Correlated inputs in two folds, a weight, and the features that stay."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or d_in, d_in, generator=generator, dtype=torch.float64)
    x = torch.randn(2, tokens, rank or d_in, generator=generator, dtype=torch.float64) @ mix
    x = x + offset + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    kept = torch.tensor([i for i in range(d_in) if i % 3])
    moments = Moments.zeros(d_in)
    for fold in range(2):
        moments.update(x[fold], fold)
    return x, weight, kept, moments


def output_error(x, weight, bias_change, new, kept):
    change = -weight.clone()
    change[:, kept] += new
    return (x @ change.T + bias_change).square().sum()


@pytest.mark.parametrize("mode", ["none", "bias", "linear", "affine"])
def test_reported_errors_are_those_of_the_tokens(mode):
    x, weight, kept, moments = problem(rank=12)
    bias = torch.randn(9, dtype=torch.float64)
    solution = solve(weight, bias, moments, kept, mode=mode)
    everything = x.flatten(0, 1)
    energy = (everything @ weight.T).square().sum()
    change = 0.0 if solution.bias is None else solution.bias - bias
    error = output_error(everything, weight, change, solution.weight, kept)
    assert solution.error == pytest.approx(float(error / energy), rel=1e-8)

    held_out = 0.0
    for fold in range(2):  # solve by brute force on one fold, measure on the other
        fit, test = x[fold], x[1 - fold]
        new, shift = brute_force(fit, weight, kept, mode, solution.damp)
        held_out += output_error(test, weight, shift, new, kept)
    assert solution.holdout_error == pytest.approx(float(held_out / energy), rel=1e-6)


@pytest.mark.parametrize("mode", ["linear", "affine"])
def test_folds_solved_in_turn_equal_folds_solved_together(mode, monkeypatch):
    _, weight, kept, moments = problem()
    together = solve(weight, None, moments, kept, mode=mode)
    monkeypatch.setattr("liar_ext.reconstruction.ridge.PAIRED_BYTES", 0)
    in_turn = solve(weight, None, moments, kept, mode=mode)
    assert torch.equal(together.weight, in_turn.weight)
    assert (together.damp, together.holdout_error) == (in_turn.damp, in_turn.holdout_error)


def brute_force(x, weight, kept, mode, damp):
    """Solve from tokens with the normal equations written out."""
    gone = [i for i in range(x.shape[1]) if i not in set(kept.tolist())]
    mean = x.mean(0) if mode in ("bias", "affine") else torch.zeros(x.shape[1]).double()
    centred = x - mean
    gram = centred.T @ centred
    transfer = torch.zeros(len(gone), len(kept), dtype=torch.float64)
    if mode in ("linear", "affine") and math.isfinite(damp):
        block = gram[kept][:, kept]
        ridge = damp * block.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
        transfer = torch.linalg.solve(block + ridge, gram[kept][:, gone]).T
    new = weight[:, kept] + weight[:, gone] @ transfer
    return new, weight[:, gone] @ (mean[gone] - transfer @ mean[kept])


def test_more_freedom_means_less_calibration_error():
    _, weight, kept, moments = problem(rank=12)
    errors = {
        mode: solve(weight, None, moments, kept, mode=mode, damp=1e-8).error
        for mode in ("none", "bias", "linear", "affine")
    }
    assert errors["affine"] <= errors["linear"] < errors["none"]
    assert errors["affine"] <= errors["bias"] < errors["none"]


def test_affine_restores_what_is_affine_exactly():
    x, weight, kept, moments = problem(d_in=24, rank=6)
    exact = Moments.zeros(24)
    basis = x[..., kept[:8]]
    x = torch.cat([basis, basis @ torch.randn(8, 16, dtype=torch.float64) + 3.0], dim=-1)
    for fold in range(2):
        exact.update(x[fold], fold)
    solution = solve(weight, None, exact, torch.arange(8), mode="affine", damp=0.0)
    assert solution.error < 1e-14 and solution.holdout_error < 1e-14


@pytest.mark.parametrize("tokens", [1, 2, 5, 12])
def test_few_tokens_are_never_worse_than_dropping(tokens):
    _, weight, kept, moments = problem(tokens=tokens)
    solution = solve(weight, None, moments, kept)
    dropped = solve(weight, None, moments, kept, mode="none")
    assert math.isfinite(solution.error)
    assert solution.holdout_error <= dropped.holdout_error * (1 + 1e-12)


def test_unpredictable_units_are_dropped_and_the_path_says_so():
    generator = torch.Generator().manual_seed(0)
    moments = Moments.zeros(24)
    for fold in range(2):
        x = torch.randn(30, 24, generator=generator, dtype=torch.float64)
        moments.update(x * (1 if fold else -1), fold)
    solution = solve(torch.randn(5, 24), None, moments, torch.arange(12))
    assert solution.damp == math.inf or solution.damp == max(DAMP_LADDER[:-1])
    if solution.damp == math.inf:
        assert "drop" in solution.path


@pytest.mark.parametrize("fault", ["dead", "duplicate", "all dead", "constant"])
@pytest.mark.parametrize("mode", ["linear", "affine"])
def test_degenerate_features_give_finite_certified_results(fault, mode):
    x, weight, kept, _ = problem()
    if fault == "dead":
        x[..., 1] = 0
    elif fault == "duplicate":
        x[..., 2] = x[..., 1]
    elif fault == "constant":
        x[..., 4] = 1.0
    else:
        x[:] = 0
    moments = Moments.zeros(24)
    for fold in range(2):
        moments.update(x[fold], fold)
    solution = solve(weight, None, moments, kept, mode=mode)
    numbers = (solution.error, solution.holdout_error, solution.condition)
    assert torch.isfinite(solution.weight).all() and all(map(math.isfinite, numbers))


def test_removing_dead_features_costs_nothing():
    x, weight, _, _ = problem()
    x[..., 0] = 0
    moments = Moments.zeros(24)
    for fold in range(2):
        moments.update(x[fold], fold)
    solution = solve(weight, None, moments, torch.arange(1, 24), mode="none")
    assert solution.error == 0.0


def test_keeping_everything_is_the_identity():
    _, weight, _, moments = problem()
    solution = solve(weight, None, moments, torch.arange(24))
    assert torch.equal(solution.weight, weight) and solution.error == 0.0


def test_refused():
    _, weight, kept, _ = problem()
    with pytest.raises(InputError, match="both folds need tokens"):
        solve(weight, None, Moments.zeros(24), kept)
    one_token = Moments.zeros(24)
    for fold in range(2):
        one_token.update(torch.randn(1, 24), fold)
    with pytest.raises(InputError, match='not positive definite at damp=0.0; use damp="auto"'):
        solve(weight, None, one_token, kept, damp=0.0)


def test_a_plan_for_another_model_or_bank_is_refused():
    model = tiny("llama")
    bank = calibrate(model, [tiny_inputs(model, batch=4)])
    kept = {site.name: SitePlan(site.units, (0,)) for site in sites(model)}
    plan = Plan("llama", "kv_group", kept)
    part = {name: moments for name, moments in bank.items() if name != "1.mlp"}
    with pytest.raises(InputError, match="hold every site of the plan, missing 1.mlp; give those"):
        reconstruct(model, part, plan)
    with pytest.raises(InputError, match="reconstruct: .* missing 2.attn, 2.mlp"):
        reconstruct(tiny("llama", num_hidden_layers=2), bank, plan)
    wider = Plan("llama", "kv_group", kept | {"1.mlp": SitePlan(48, (40,))})
    with pytest.raises(InputError, match="1.mlp has 24 units, the plan counts 48"):
        reconstruct(model, bank, wider)
    with pytest.raises(InputError, match="mode must be one of auto, none, bias, linear, affine"):
        reconstruct(model, bank, plan, mode="ridge")
    with pytest.raises(InputError, match='damp must be "auto" or a number >= 0'):
        reconstruct(model, bank, plan, damp=-1.0)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2, 3]])
def test_sums_that_overflow_are_no_error_of_zero(kept, target):
    """Of a feature that stays they gave an error of 0, of one that goes a hint to what was done."""
    weight, moments = torch.randn(3, 5), Moments.zeros(5)
    for fold in range(2):
        moments.update(torch.randn(40, 5), fold)
    moments.gram[0, 1, 1] = math.inf
    kept = torch.tensor(kept)
    with pytest.raises(InputError, match="moments must be finite"):
        if target:
            solve(weight, None, moments, kept, target=Residual.zeros(5, 3))
        else:
            solve(weight, None, moments, kept)


def test_what_is_not_finite_is_not_zero():
    number, nothing = torch.tensor(2.0), torch.tensor(0.0)
    for value in (math.nan, math.inf, -math.inf):
        for other in (number, nothing, torch.tensor(value)):
            assert math.isnan(ratio(torch.tensor(value), other))
        assert math.isnan(ratio(number, torch.tensor(value)))
    assert ratio(number, number) == 1.0 and ratio(number, nothing) == 0.0
    assert ratio(-1e-9 * number, number) == 0.0


@pytest.mark.parametrize("where", ["weight", "gram"])
@pytest.mark.parametrize("kept", [[0, 2, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_a_nan_is_refused_with_its_cause(where, kept):
    weight, moments, kept = torch.ones(3, 8), Moments.zeros(8), torch.tensor(kept)
    for fold in range(2):
        moments.update(torch.randn(60, 8), fold)
    solve(weight, None, moments, kept)
    (weight if where == "weight" else moments.gram[0])[2, 1] = torch.nan
    with pytest.raises(InputError, match="must be finite, got"):
        solve(weight, None, moments, kept)


def test_a_refusal_does_not_advise_what_was_done():
    weight, moments = torch.full((3, 5), 1e200, dtype=torch.float64), Moments.zeros(5)
    for fold in range(2):
        moments.update(torch.randn(40, 5), fold)
    with pytest.raises(InputError, match="no damp gives a finite held-out error"):
        solve(weight, None, moments, torch.tensor([0, 2]))
