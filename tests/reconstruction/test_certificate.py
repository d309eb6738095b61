"""The held-out error of a report is what fresh text shows; bench/certificate.py has real text."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import Budget, allocate, calibrate, reconstruct, score, sites
from liar_ext.models.sites import get_consumer_weight
from liar_ext.reconstruction.ladder import least_held_out


@pytest.fixture(scope="module")
def model():
    return tiny("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def fresh(model):
    return moments_of(model, 100, seed=1000)


def moments_of(model, batches, seed, rows=6):
    data = [tiny_inputs(model, rows, 12, seed + index) for index in range(batches)]
    return calibrate(model, data, sites(model))


def errors(model, bank, fresh, criterion):
    """Return by site the predicted error, the one on fresh tokens, and that of dropping there."""
    at = sites(model)
    plan = allocate(at, score(model, bank, at, criterion), Budget(0.6), model_type="llama")
    weights, rows = reconstruct(model, bank, plan)
    found = []
    for site, row in zip(at, rows, strict=True):
        gram = fresh[site.name].pooled()[0]
        gram = gram.tril() + gram.tril(-1).mT
        dense = get_consumer_weight(model, site).detach()
        kept = site.features(plan.sites[site.name].kept)
        dropped = dense.clone()
        dropped[:, kept] = 0
        change = dropped.clone()
        change[:, kept] = dense[:, kept] - weights[site.name][0]
        energy, error, without = (float(((w @ gram) * w).sum()) for w in (dense, change, dropped))
        if row.units_after < row.units_before:
            found.append((row.holdout_error, error / energy, without / energy))
    return torch.tensor(found)


@pytest.mark.parametrize("criterion", ["wifv", "obs"])
def test_held_out_errors_are_those_of_fresh_text(model, fresh, criterion):
    predicted, measured, dropped = errors(
        model, moments_of(model, 60, seed=0), fresh, criterion
    ).unbind(1)
    # A site is judged by some thousand random tokens, on either side.
    assert torch.allclose(measured, predicted, rtol=0.15)
    assert float(measured.sum()) == pytest.approx(float(predicted.sum()), rel=0.1)
    assert (measured < dropped).all()


@pytest.mark.parametrize("tokens", [24, 48, 96])
def test_with_few_tokens_it_is_no_worse_than_dropping(model, fresh, tokens):
    banks = [moments_of(model, 1, seed=50 + seed, rows=tokens // 12) for seed in range(8)]
    found = torch.stack([errors(model, bank, fresh, "wifv") for bank in banks])
    _, measured, dropped = found.unbind(-1)
    # A choice by some dozen tokens may be unlucky at a site; not by much, and not on the whole.
    assert (measured <= (1.1 if tokens == 24 else 1.05) * dropped).all()
    assert measured.sum() < dropped.sum()
    assert tokens == 24 or (measured.sum(1) <= dropped.sum(1)).all()
    # Few tokens support what is shrunken most: a ladder that ends sooner drops in their place.
    assert (measured < dropped).sum() > 4


def test_a_ridge_that_is_worse_than_dropping_in_one_fold_is_not_taken():
    errors = torch.tensor([[1.1, 0.9, 1.0], [0.1, 0.9, 1.0]])
    assert least_held_out(errors, [1e-3, 1e-2, math.inf]) == 1
    assert least_held_out(errors, [1e-3, 1e-2, 1e-1]) == 0
    errors[0, 1] = math.nan
    assert least_held_out(errors, [1e-3, 1e-2, math.inf]) == 2
