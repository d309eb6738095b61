"""Error curves against reconstruct for every number of units, and in every order."""

from __future__ import annotations

import math

import forked
import pytest
import torch
from tiny import batches, tiny, tiny_inputs

from liar_ext import InputError, calibrate, ops, prune, score, sites
from liar_ext.calibration.batches import FOLDS
from liar_ext.models.sites import get_consumer_weight
from liar_ext.reconstruction.ladder import in_file
from liar_ext.selection.allocation import removal_order, select
from liar_ext.selection.error_curves import error_curve, error_curves, invert_in_place

DAMP = 1e-2


def problem(tokens=120, d=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, d, generator=generator, dtype=torch.float64) @ mix
    gram = x.mT @ x
    gram[torch.ones_like(gram, dtype=torch.bool).triu(1)] = torch.nan
    return torch.randn(5, d, generator=generator, dtype=torch.float64), gram


def solve_again(weight, gram, order, damp, holdout, at=None):
    """The curve, point by point: a solve for each number of units gone, or for those of ``at``."""
    d, units = weight.shape[1], len(order)
    full = gram.tril() + gram.tril(-1).mT
    shift = damp * float(full.diagonal().mean() or 1.0)
    points = []
    for gone in range(units + 1) if at is None else at:
        stays = torch.ones(units, d // units, dtype=torch.bool)
        stays[order[:gone]] = False
        kept = stays.flatten().nonzero().flatten()
        own_mean = float(full.diagonal()[kept].mean()) if len(kept) else 1.0
        damps = torch.tensor([shift / (own_mean or 1.0)], dtype=torch.float64)
        points.append(float(ops.reconstruct(weight, gram, kept, damps, holdout=holdout)[2][0]))
    return torch.tensor(points, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [120, 10, 1])
@pytest.mark.parametrize("width", [1, 4, 24])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_point_equals_solving_again(tokens, width, seed):
    weight, gram = problem(tokens)
    holdout = problem(60, seed=7)[1]
    order = torch.randperm(24 // width, generator=torch.Generator().manual_seed(seed))
    for judge in (holdout, gram):
        got = error_curve(weight, gram, order, DAMP, holdout=judge)
        want = solve_again(weight, gram, order, DAMP, judge)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * float(want[-1]))
    assert torch.equal(got, error_curve(weight, gram, order, DAMP))


@pytest.mark.parametrize("d", [255, 256, 257, 600])
def test_points_on_both_sides_of_a_block_of_rows(d):
    weight, gram = problem(2 * d, d)
    holdout = problem(d, d, seed=7)[1]
    order = torch.randperm(d, generator=torch.Generator().manual_seed(2))
    at = [0, 1, d - 257, d - 256, d - 255, d // 2, d - 1, d]
    at = [gone for gone in at if gone >= 0]
    got = error_curve(weight, gram, order, DAMP, holdout=holdout)[at]
    want = solve_again(weight, gram, order, DAMP, holdout, at)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * float(want[-1]))


@pytest.mark.parametrize("d", [1, 256, 1030, 1290])
def test_a_factor_is_inverted_in_its_place(d):
    random = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    factor = random.tril(-1) / d + torch.eye(d)
    expected = torch.linalg.inv(factor)
    invert_in_place(factor)
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=1e-14)


def test_dead_features_cost_nothing_and_a_singular_gram_is_refused():
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    order = torch.tensor([5, *(k for k in range(24) if k != 5)])
    curve = error_curve(weight, gram, order, DAMP)
    assert curve[1] <= 1e-12 * curve[-1] < curve[2]
    with pytest.raises(InputError, match="damp=0 leaves the Gram matrix singular"):
        error_curve(weight, gram, order, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_order_is_the_one_that_select_follows(groups):
    scores = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(groups)).double()
    order = removal_order(scores, groups).tolist()
    for gone in range(0, 12, groups):
        kept = select(scores, 12 - gone, groups)
        assert set(order[:gone]) == set(range(12)) - set(kept)


@pytest.mark.parametrize("attn_unit", ["kv_group", "head"])
def test_curves_of_a_model(attn_unit):
    model = tiny("llama")
    at = sites(model, attn_unit=attn_unit)
    bank = calibrate(model, [tiny_inputs(model, batch=8, tokens=16, seed=s) for s in range(3)], at)
    scores = score(model, bank, at, "wifv")
    curves = error_curves(model, bank, at, scores)
    for site in at:
        weight = get_consumer_weight(model, site).double()
        order = removal_order(scores[site.name], site.groups)
        gram = bank[site.name].gram
        want = sum(
            solve_again(weight, gram[fold], order, DAMP, gram[FOLDS - 1 - fold])
            for fold in range(FOLDS)
        )
        torch.testing.assert_close(curves[site.name], want / want[-1])


def test_curves_of_what_is_missing_or_infinite_are_refused():
    model = tiny("llama")
    at = sites(model)
    bank = calibrate(model, [tiny_inputs(model, batch=8)], at)
    scores = score(model, bank, at, "wifv")
    with pytest.raises(InputError, match="moments are missing for 0.attn"):
        error_curves(model, {}, at, scores)
    with pytest.raises(InputError, match="scores are missing for 0.attn"):
        error_curves(model, bank, at, {})
    for damp in (math.inf, math.nan, -1.0):
        with pytest.raises(InputError, match="damp must be finite and at least 0"):
            error_curves(model, bank, at, scores, damp=damp)


def test_a_site_without_output_has_no_error():
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    at = sites(model)
    bank = calibrate(model, [tiny_inputs(model, batch=8)], at)
    curves = error_curves(model, bank, at, score(model, bank, at, "wifv"))
    assert not curves["0.mlp"].any() and curves["1.mlp"].any()


@pytest.mark.parametrize("d", [24, 600])
def test_in_a_file_a_curve_is_the_same_to_the_last_bit(d):
    weight, gram = problem(2 * d, d)
    holdout = problem(d, d, seed=7)[1].float()
    order = torch.randperm(d // 4, generator=torch.Generator().manual_seed(2))
    in_memory = error_curve(weight, gram, order, DAMP, holdout)
    assert torch.equal(error_curve(weight, gram, order, DAMP, holdout, in_file), in_memory)


def test_a_curve_that_memory_has_no_room_for(tmp_path):
    """A limit of private memory that a curve's matrices don't fit, and its blocks do."""
    model = tiny("llama", intermediate_size=1600, num_hidden_layers=1)  # a square is 20 MiB
    at = [site for site in sites(model) if site.kind == "mlp"]
    bank = calibrate(model, [tiny_inputs(model, batch=8, seed=s) for s in range(2)], at)
    given = model, bank, at, score(model, bank, at, "wifv")
    expected = error_curves(*given)

    def cramped():
        forked.cramp(30 << 20)
        assert torch.equal(error_curves(*given)["0.mlp"], expected["0.mlp"])

    said = tmp_path / "said"
    assert forked.end(forked.fork(cramped, said)) == 0, said.read_text()


def test_a_job_with_no_room_in_memory(monkeypatch):
    ordinary, model = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    before = prune(ordinary, batches(ordinary), 0.7)

    def curve(weight, gram, order, damp, holdout=None, allocate=None):
        if allocate is None:
            raise MemoryError
        return error_curve(weight, gram, order, damp, holdout, allocate)

    monkeypatch.setattr("liar_ext.selection.error_curves.error_curve", curve)
    assert prune(model, batches(model), 0.7).plan == before.plan
    for name, value in ordinary.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_neither_memory_nor_a_file(monkeypatch):
    def nowhere(*_, **__):
        raise MemoryError("no file of 9 GiB")

    monkeypatch.setattr("liar_ext.selection.error_curves.error_curve", nowhere)
    model = tiny("llama")
    with pytest.raises(MemoryError, match="error_curves: out of memory in the error curve of 0.at"):
        prune(model, batches(model), 0.7)
