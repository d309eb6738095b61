"""Scales and offsets of a narrowed norm, and what it loses, against the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from liar_ext import Moments
from liar_ext.ops.reference import symmetric
from liar_ext.reconstruction.hidden_size import fit_norm, lost_moments

KEPT = torch.tensor([0, 2, 3])
N, HIDDEN = 3, 5


def both(v: torch.Tensor, x: torch.Tensor) -> Moments:
    """Return the moments of [v; x]; ``(2, tokens, features)`` each."""
    moments = Moments.zeros(N + HIDDEN)
    for fold in range(2):
        moments.update(torch.cat([v[fold], x[fold]], dim=1), fold)
    return moments


def problem(tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, tokens, HIDDEN, dtype=torch.float64) + 0.4
    v = 0.8 * x[..., KEPT] + 0.3 * torch.randn(2, tokens, N, dtype=torch.float64) - 0.1
    return v, x


def test_what_is_affine_is_fitted_exactly():
    v, x = problem()
    slope, offset = torch.tensor([2.0, -0.5, 1.0]), torch.tensor([0.3, 0.0, -1.0])
    x[..., KEPT] = v * slope + offset
    solution = fit_norm(both(v, x), KEPT, with_offset=True)
    got_slope, got_offset = solution.weight, solution.bias
    torch.testing.assert_close(got_slope, slope.double())
    torch.testing.assert_close(got_offset, offset.double())
    removed = [1, 4]
    share = float(x[..., removed].square().sum() / x.square().sum())
    assert solution.error == pytest.approx(share) == solution.holdout_error


@pytest.mark.parametrize("with_offset", [True, False])
def test_scales_are_least_squares_and_errors_those_of_the_tokens(with_offset):
    v, x = problem()
    solution = fit_norm(both(v, x), KEPT, with_offset)
    slope, offset = solution.weight, solution.bias

    def fit(v, x):
        columns = []
        for j in range(N):
            design = torch.stack([v[:, j], torch.ones_like(v[:, j])], dim=1)
            design = design if with_offset else design[:, :1]
            found = torch.linalg.lstsq(design, x[:, KEPT[j]]).solution
            columns.append((float(found[0]), float(found[1]) if with_offset else 0.0))
        return torch.tensor(columns, dtype=torch.float64).T

    def error(v, x, s, c):
        left = x.clone()
        left[:, KEPT] -= s * v + c
        return float(left.square().sum())

    energy = float(x.square().sum())
    whole = fit(v.flatten(0, 1), x.flatten(0, 1))
    torch.testing.assert_close(slope, whole[0])
    torch.testing.assert_close(offset, whole[1])
    assert solution.error == pytest.approx(error(v.flatten(0, 1), x.flatten(0, 1), *whole) / energy)
    held_out = sum(error(v[1 - f], x[1 - f], *fit(v[f], x[f])) for f in range(2))
    assert solution.holdout_error == pytest.approx(held_out / energy)


def test_a_feature_without_spread_keeps_its_scale():
    v, x = problem()
    v[..., 1] = 0.7
    solution = fit_norm(both(v, x), KEPT, with_offset=True)
    slope, offset = solution.weight, solution.bias
    assert slope[1] == 1.0
    assert float(offset[1]) == pytest.approx(float(x[..., 2].mean()) - 0.7)
    assert 0 < solution.error < 1


def test_lost_moments_are_those_of_the_remainder():
    v, x = problem()
    slope = torch.tensor([1.1, 0.7, -0.4], dtype=torch.float64)
    offset = torch.tensor([0.2, -0.3, 0.0], dtype=torch.float64)
    moments = both(v, x)
    before = moments.gram.clone()
    got = lost_moments(moments, KEPT, slope, offset)
    for fold in range(2):
        given = slope * v[fold] + offset
        lost = x[fold].clone()
        lost[:, KEPT] -= given
        whole = torch.cat([given, lost], dim=1)
        torch.testing.assert_close(symmetric(got.gram[fold]), whole.T @ whole)
        torch.testing.assert_close(got.total[fold], whole.sum(0))
    assert torch.equal(got.count, moments.count) and torch.equal(moments.gram, before)
