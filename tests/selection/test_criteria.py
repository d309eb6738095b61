from __future__ import annotations

import pytest
import torch
from tiny import read_by_consumers, tiny, tiny_inputs

from liar_ext import InputError, calibrate, criterion, ops, score, sites
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.models.sites import get_consumer_weight
from liar_ext.selection.allocation import select
from liar_ext.selection.criteria import _CRITERIA


@pytest.fixture(scope="module")
def job():
    model = tiny("llama")
    batches = [tiny_inputs(model, batch=4, tokens=9, seed=seed) for seed in range(4)]
    at = sites(model)
    inputs = {
        name: torch.cat([part.flatten(0, -2).double() for part in parts])
        for name, parts in read_by_consumers(model, batches).items()
    }
    return model, calibrate(model, batches, at), at, inputs


def by_definition(name: str, weight: torch.Tensor, x: torch.Tensor, width: int) -> torch.Tensor:
    """Score unit by unit from the tokens themselves."""
    scores = []
    for at in range(0, weight.shape[1], width):
        w, x_u = weight[:, at : at + width], x[:, at : at + width]
        if name == "magnitude":
            scores.append(w.square().sum())
        elif name == "wanda":
            norm = x_u.square().mean(0).sqrt()
            scores.append((w.abs() * norm).sum())
        elif name == "wifv":
            scores.append((w.square() * x_u.var(0, unbiased=False)).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "wifv"])
def test_scores_equal_their_definition(job, name):
    model, bank, at, inputs = job
    scores = score(model, bank, at, name)
    for site in at:
        weight = get_consumer_weight(model, site).double()
        expected = by_definition(name, weight, inputs[site.name], site.width)
        torch.testing.assert_close(scores[site.name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "wifv"])
def test_scores_of_features_equal_their_definition(job, name):
    model, bank, at, inputs = job
    by_feature, by_unit = (score(model, bank, at, name, per=per) for per in ("feature", "unit"))
    for site in at:
        weight = get_consumer_weight(model, site).double()
        expected = by_definition(name, weight, inputs[site.name], 1)
        torch.testing.assert_close(by_feature[site.name], expected, rtol=1e-5, atol=1e-8)
        summed = by_feature[site.name].reshape(-1, site.width).sum(1)
        assert torch.equal(by_unit[site.name], summed)


def test_criteria_without_scores_of_features_give_those_of_units(job):
    model, bank, at, _ = job
    for name in ("random", "obs"):
        by_feature, by_unit = (score(model, bank, at, name, per=per) for per in ("feature", "unit"))
        assert all(torch.equal(by_feature[site.name], by_unit[site.name]) for site in at)
    with pytest.raises(InputError, match="per must be one of unit, feature, got 'head'"):
        score(model, bank, at, per="head")


def test_random_depends_on_seed_and_site(job):
    model, bank, at, _ = job
    one, same, other = (score(model, bank, at, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one["0.mlp"], same["0.mlp"])
    assert not torch.equal(one["0.mlp"], other["0.mlp"])
    assert not torch.equal(one["0.mlp"], one["1.mlp"])


def test_a_dead_unit_scores_least():
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[5] = 0
    batches = [tiny_inputs(model, batch=8)]
    bank, at = calibrate(model, batches), sites(model)
    for name in sorted(_CRITERIA.keys() - {"random", "magnitude"}):
        scores = score(model, bank, at, name, batches=batches)
        assert int(scores["0.mlp"].argmin()) == 5, name


def test_users_register_their_own(job):
    model, bank, at, _ = job

    @criterion("last")
    def last(stats):
        assert stats.site in [site.name for site in at]
        return torch.arange(stats.weight.shape[1] // stats.width).double()

    @criterion("last_feature")
    def last_feature(stats):
        return torch.arange(stats.weight.shape[1]).double()

    try:
        assert score(model, bank, at, "last")["0.mlp"].tolist()[:3] == [0, 1, 2]
        assert score(model, bank, at, "last")["0.attn"].tolist() == [0, 1, 2, 3]
        assert score(model, bank, at, "last_feature")["0.attn"].tolist() == [28, 92, 156, 220]
    finally:
        del _CRITERIA["last"], _CRITERIA["last_feature"], CRITERIA["last"], CRITERIA["last_feature"]


def test_unknown_and_broken_criteria(job):
    model, bank, at, _ = job
    with pytest.raises(InputError, match="unknown criterion 'best'; known: fisher, magnitude, obs"):
        score(model, bank, at, "best")
    with pytest.raises(InputError, match="score: moments are missing for 0.attn, 0.mlp"):
        score(model, {}, at)
    with pytest.raises(InputError, match="needs must be one of"):
        criterion("x", needs="magic")

    @criterion("nan")
    def nan(stats):
        return torch.full((stats.weight.shape[1] // stats.width,), float("nan"))

    criterion("listed")(lambda stats: [1.0, 2.0])
    try:
        for name in ("nan", "listed"):
            with pytest.raises(InputError, match="give 4 finite scores at 0.attn, or 32 by featur"):
                score(model, bank, at, name)
    finally:
        del _CRITERIA["nan"], _CRITERIA["listed"], CRITERIA["nan"], CRITERIA["listed"]


@pytest.mark.parametrize("attn_unit", ["kv_group", "head"])
def test_obs_keeps_what_greedy_elimination_leaves(attn_unit):
    model = tiny("llama")
    at = sites(model, attn_unit=attn_unit)
    bank = calibrate(model, [tiny_inputs(model, batch=8, seed=seed) for seed in range(3)], at)
    scores = score(model, bank, at, "obs")
    for site in at:
        gram, _, tokens = bank[site.name].pooled()
        weight = get_consumer_weight(model, site).double()
        order, error, _ = ops.obs_curve(weight, gram, site.width, 1e-2, 0, site.groups)
        for gone in range(0, site.units, site.groups):
            kept = select(scores[site.name], site.units - gone, site.groups)
            assert set(kept) == set(range(site.units)) - set(order[:gone].tolist())
        assert torch.equal(scores[site.name].sort().values, error[1:] / tokens)


def test_obs_names_moments_that_are_damaged():
    model = tiny("llama")
    at = sites(model)
    bank = calibrate(model, [tiny_inputs(model, batch=8)], at)
    bank["1.mlp"].gram[0, 3, 3] = -1e9
    with pytest.raises(InputError, match="criterion obs must give .* finite scores at 1.mlp"):
        score(model, bank, at, "obs")
