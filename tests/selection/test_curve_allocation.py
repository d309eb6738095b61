"""Losses of sites and plans, and plans refined by what they measure."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, tiny_inputs

from liar_ext import Budget, allocate, calibrate, reconstruct, score, site_divergences, sites
from liar_ext.data.batches import probe_batches
from liar_ext.selection.allocation import probe_plan
from liar_ext.selection.curve_allocation import measure_losses
from liar_ext.selection.error_curves import CURVE_DAMP
from liar_ext.selection.refine import predict_divergence, refine_plan
from liar_ext.selection.sensitivity import divergences

BUDGET = Budget(0.5)


@pytest.fixture(scope="module")
def job():
    model = tiny("llama")
    at = sites(model)
    data = [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(3)]
    bank = calibrate(model, data, at)
    scores = score(model, bank, at, "obs")
    losses, _ = measure_losses(model, bank, at, scores, BUDGET, data)
    return model, data, at, bank, scores, losses


def test_losses_pass_through_what_was_measured(job):
    model, data, at, bank, scores, losses = job
    plan = probe_plan(at, scores, BUDGET)
    weights, _ = reconstruct(model, bank, plan, damp=CURVE_DAMP)
    measured = site_divergences(model, data, plan, weights)
    for name in plan.sites:
        assert predict_divergence(losses, plan, [name]) == pytest.approx(measured[name])
    assert predict_divergence(losses, plan) == pytest.approx(sum(measured.values()))


def test_probes_are_spread_evenly():
    ids = torch.arange(48 * 512).view(48, 512)
    batches = [{"input_ids": ids[:23], "fold": torch.zeros(23)}, ids[23:24], ids[24:]]
    probes = [batch["input_ids"] for batch in probe_batches(batches)]
    assert torch.cat(probes)[:, 0].tolist() == [512 * row for row in range(1, 48, 3)]
    assert all(probe.shape[1] == 128 for probe in probes)
    assert len(probe_batches([ids[:3]])[0]["input_ids"]) == 3 and not probe_batches([])
    pixels = torch.zeros(99, 3, 8, 8)
    assert len(probe_batches([{"pixel_values": pixels}])[0]["pixel_values"]) == 16


def test_probes_of_one_width_share_batches_and_padding_is_left_alone():
    ids = torch.arange(32 * 256).view(32, 256)
    single = [{"input_ids": row[None], "attention_mask": torch.ones(1, 256)} for row in ids]
    probes = probe_batches(single)
    assert [tuple(probe["input_ids"].shape) for probe in probes] == 4 * [(4, 128)]
    assert [tuple(probe["attention_mask"].shape) for probe in probes] == 4 * [(4, 128)]
    left = torch.ones(1, 256, dtype=torch.long)
    left[:, :200] = 0  # the first 128 tokens are padding
    padded = probe_batches([{"input_ids": row[None], "attention_mask": left} for row in ids])
    assert {probe["input_ids"].shape for probe in padded} == {(1, 256)}
    assert sum(int(probe["attention_mask"].sum()) for probe in padded) >= 32 * 56


def test_short_sequences_make_up_for_their_length_by_their_number():
    mask = torch.zeros(1000, 20, dtype=torch.long)
    mask[:, :8] = 1
    batches = [
        {"input_ids": mask[start : start + 10], "attention_mask": mask[start : start + 10]}
        for start in range(0, 1000, 10)
    ]
    probes = probe_batches(batches)
    assert sum(int(probe["attention_mask"].sum()) for probe in probes) == 2048
    assert len(probes) == 100


def refined(job, plan, rounds, budget=BUDGET, at=None, start=None):
    model, data, every, bank, scores, losses = job
    return refine_plan(
        model, bank, at or every, scores, budget, data, start or losses, plan, rounds=rounds
    )


@pytest.mark.parametrize("uniform_layers", [False, True])
def test_refinement_never_ends_worse_and_keeps_the_budget(job, uniform_layers):
    model, data, at, bank, scores, losses = job
    budget = Budget(0.5, tile=4, uniform_layers=uniform_layers)
    # Losses that mislead: attention is said to hardly matter.
    wrong = {name: loss * (0.1 if "attn" in name else 1.0) for name, loss in losses.items()}
    start = allocate(at, scores, budget, "curve", losses=wrong)
    plan, history = refined(job, start, 6, budget, start=wrong)
    assert history == sorted(history, reverse=True) and len(history) <= 7
    for each, want in ((start, history[0]), (plan, history[-1])):
        weights, _ = reconstruct(model, bank, each, damp=CURVE_DAMP)
        (got,) = divergences(model, data, each, weights, [list(each.sites)])
        assert got == want
    if not uniform_layers:
        assert history[-1] < 0.9 * history[0]
    kept = sum(len(plan.sites[site.name].kept) * site.unit_params for site in at)
    assert kept <= 0.5 * sum(site.params for site in at)
    for site in at:
        assert site.kind == "attn" or len(plan.sites[site.name].kept) % 4 == 0


def test_refinement_is_deterministic_and_leaves_the_model_alone(job):
    model, data, at, bank, scores, losses = job
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = allocate(at, scores, BUDGET, "curve", losses=losses)
    assert refined(job, start, 2) == refined(job, start, 2)
    assert refined(job, start, 0) == (start, refined(job, start, 2)[1][:1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_to_refine_where_nothing_goes(job):
    _, _, at, _, scores, losses = job
    whole = allocate(at, scores, Budget(1.0), "curve", losses=losses)
    assert refined(job, whole, 3, Budget(1.0)) == (whole, [0.0] * 4)
