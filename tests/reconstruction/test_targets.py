from __future__ import annotations

import math

import pytest
import torch

from liar_ext import InputError, Moments
from liar_ext.reconstruction.ridge import Residual
from liar_ext.reconstruction.solve import solve

KEPT = torch.tensor([i for i in range(24) if i % 3])


def problem(tokens=300, noise=1.0, d_in=24, d_out=9, rank=None):
    """Inputs and the residual of a target in two folds, with their sums."""
    mix = torch.randn(rank or d_in, d_in).double()
    x = torch.randn(2, tokens, rank or d_in).double() @ mix + 0.5
    weight, bias = torch.randn(d_out, d_in).double(), torch.randn(d_out).double()
    r = x @ torch.randn(d_in, d_out).double() / 3 + 0.4 + noise * torch.randn(2, tokens, d_out)
    moments, residual = Moments.zeros(d_in), Residual.zeros(d_in, d_out)
    for fold in range(2):
        every = torch.ones(tokens, dtype=torch.bool)
        moments.update(x[fold], fold, every)
        residual.update(x[fold], r[fold], fold, every)
    return x, r, weight, bias, moments, residual


def brute_force(x, r, weight, bias, mode, damp, share):
    """Solve from tokens; return weight and bias."""
    y = x @ weight.T + bias + share * r
    mean, middle = (x.mean(0), y.mean(0)) if mode == "affine" else (torch.zeros(24).double(), bias)
    xk, mk = (x - mean)[:, KEPT], mean[KEPT]
    if math.isinf(damp):
        new = weight[:, KEPT]
    else:
        block = xk.T @ xk
        ridge = damp * block.diagonal().mean() * torch.eye(len(KEPT)).double()
        right = xk.T @ (y - middle) + ridge @ weight[:, KEPT].T
        new = torch.linalg.solve(block + ridge, right).T
    return new, middle - new @ mk if mode == "affine" else bias


def distance(x, r, weight, bias, new, new_bias):
    """Squared error to the full target, and the energy that errors are relative to."""
    wanted = x @ weight.T + bias + r
    return (x[:, KEPT] @ new.T + new_bias - wanted).square().sum()


@pytest.mark.parametrize("mode", ["linear", "affine"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("damp", [1e-3, math.inf])
def test_weights_and_errors_are_those_of_the_tokens(mode, share, damp):
    x, r, weight, bias, moments, residual = problem()
    given, step = {"target": residual, "mode": mode, "damp": damp}, (share, share)
    solution = solve(weight, bias, moments, KEPT, step=step, **given)
    tokens, missing = x.flatten(0, 1), r.flatten(0, 1)
    energy = (tokens @ weight.T).square().sum()
    new, new_bias = brute_force(tokens, missing, weight, bias, mode, damp, share)
    assert torch.allclose(solution.weight, new, rtol=1e-8, atol=1e-10)
    if mode == "affine":
        assert torch.allclose(solution.bias, new_bias, rtol=1e-8, atol=1e-10)
    else:
        assert solution.bias is None
    error = distance(tokens, missing, weight, bias, new, new_bias)
    assert solution.error == pytest.approx(float(error / energy), rel=1e-8)
    held_out = 0.0
    for fold in range(2):
        fit = brute_force(x[fold], r[fold], weight, bias, mode, damp, share)
        held_out += distance(x[1 - fold], r[1 - fold], weight, bias, *fit)
    assert solution.holdout_error == pytest.approx(float(held_out / energy), rel=1e-8)


@pytest.mark.parametrize("mode", ["linear", "affine"])
def test_without_a_residual_it_is_the_plain_solve(mode):
    _, _, weight, bias, moments, _ = problem()
    zero = Residual.zeros(24, 9)
    ours = solve(weight, bias, moments, KEPT, target=zero, step=(0.0, 1.0), mode=mode)
    plain = solve(weight, bias, moments, KEPT, mode=mode)
    assert torch.allclose(ours.weight, plain.weight, rtol=1e-9, atol=1e-12)
    assert ours.damp == plain.damp and ours.step_size == 0
    assert ours.error == pytest.approx(plain.error, rel=1e-9)
    assert ours.holdout_error == pytest.approx(plain.holdout_error, rel=1e-9)


def test_undamped_it_is_the_least_squares_refit():
    x, r, weight, bias, moments, residual = problem()
    given = {"target": residual, "mode": "linear", "damp": 0.0}
    solution = solve(weight, bias, moments, KEPT, step=(1.0, 1.0), **given)
    tokens = x.flatten(0, 1)
    wanted = tokens @ weight.T + r.flatten(0, 1)
    refit = torch.linalg.lstsq(tokens[:, KEPT], wanted).solution.T
    assert torch.allclose(solution.weight, refit, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["linear", "affine"])
@pytest.mark.parametrize("tokens", [1, 2, 12, 40, 500])
@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_never_worse_on_held_out_tokens_than_the_own_target(mode, tokens, noise):
    _, _, weight, bias, moments, residual = problem(tokens, noise)
    both = [
        solve(weight, bias, moments, KEPT, target=residual, step=step, mode=mode)
        for step in ((0.0, 0.0), (0.0, 1.0))
    ]
    own, chosen = (solution.holdout_error for solution in both)
    assert chosen <= own * (1 + 1e-12) and torch.isfinite(both[1].weight).all()
    grid = [
        solve(weight, bias, moments, KEPT, target=residual, step=(a, a), mode=mode)
        for a in (0.25, 0.5, 0.75, 1.0)
    ]
    assert chosen <= min(solution.holdout_error for solution in grid) * (1 + 1e-9)


def test_noise_of_few_tokens_is_not_followed():
    *_, quiet = problem(400, noise=0.01)
    _, _, weight, bias, moments, noisy = problem(26, noise=100.0)
    choices = {"step": (0.0, 1.0), "mode": "linear"}
    assert solve(weight, bias, moments, KEPT, target=noisy, **choices).step_size < 0.2
    _, _, weight, bias, moments, quiet = problem(400, noise=0.01)
    assert solve(weight, bias, moments, KEPT, target=quiet, **choices).step_size > 0.9


def test_rank_deficient_input_is_solved_and_certified():
    _, _, weight, bias, moments, residual = problem(tokens=50, rank=4)
    solution = solve(weight, bias, moments, KEPT, target=residual, step=(0.0, 1.0))
    assert torch.isfinite(solution.weight).all() and math.isfinite(solution.holdout_error)


def test_refused():
    _, _, weight, bias, moments, residual = problem(tokens=1)
    with pytest.raises(InputError, match="not positive definite at damp=0.0"):
        solve(weight, bias, moments, KEPT, target=residual, mode="linear", damp=0.0)
    with pytest.raises(InputError, match="both folds need tokens"):
        solve(weight, bias, Moments.zeros(24), KEPT, target=residual)
