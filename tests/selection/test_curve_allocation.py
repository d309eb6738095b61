"""Losses of sites and plans."""

from __future__ import annotations

import pytest
import torch
from losses import measure_losses
from tiny import tiny, tiny_inputs

from liar_ext import Budget, InputError, calibrate, reconstruct, score, site_divergences, sites
from liar_ext.calibration.batches import probe_batches
from liar_ext.models.sites import get_consumer_bias, get_consumer_weight
from liar_ext.selection.allocation import probe_plan
from liar_ext.selection.error_curves import (
    CURVE_DAMP,
    error_curves,
    predict_divergence,
    probe_sites,
)

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
        loss = float(losses[name][len(plan.sites[name].removed)])
        assert loss == pytest.approx(measured[name])
    assert predict_divergence(losses, plan) == pytest.approx(sum(measured.values()))


def test_probes_are_spread_evenly():
    ids = torch.arange(48 * 512).view(48, 512)
    batches = [{"input_ids": ids[:23], "fold": torch.zeros(23)}, ids[23:24], ids[24:]]
    probes = [batch["input_ids"] for batch in probe_batches(batches)]
    assert torch.cat(probes)[:, 0].tolist() == [512 * row for row in range(1, 48, 3)]
    assert all(probe.shape[1] == 128 for probe in probes)
    assert len(probe_batches([ids[:3]])[0]["input_ids"]) == 3 and not probe_batches([])
    pixels = torch.zeros(128, 3, 8, 8)
    assert len(probe_batches([{"pixel_values": pixels}])[0]["pixel_values"]) == 16


def test_probes_of_one_width_share_batches_and_padding_is_left_alone():
    ids = torch.arange(64 * 256).view(64, 256)
    single = [{"input_ids": row[None], "attention_mask": torch.ones(1, 256)} for row in ids]
    probes = probe_batches(single)
    assert [tuple(probe["input_ids"].shape) for probe in probes] == 4 * [(4, 128)]
    assert [tuple(probe["attention_mask"].shape) for probe in probes] == 4 * [(4, 128)]
    left = torch.ones(1, 256, dtype=torch.long)
    left[:, :200] = 0  # the first 128 tokens are padding
    padded = probe_batches([{"input_ids": row[None], "attention_mask": left} for row in ids])
    assert {probe["input_ids"].shape for probe in padded} == {(1, 256)}
    assert 1024 <= sum(int(probe["attention_mask"].sum()) for probe in padded) < 1024 + 56


def test_short_sequences_make_up_for_their_length_by_their_number():
    mask = torch.zeros(2048, 20, dtype=torch.long)
    mask[:, :8] = 1
    batches = [
        {"input_ids": mask[start : start + 16], "attention_mask": mask[start : start + 16]}
        for start in range(0, 2048, 16)
    ]
    probes = probe_batches(batches)
    assert sum(int(probe["attention_mask"].sum()) for probe in probes) == 2048
    assert len(probes) == 128


@pytest.mark.parametrize(("rows", "taken"), [(200, 16), (64, 16), (48, 12), (32, 8), (20, 8)])
def test_less_text_gives_fewer_probes_but_half_at_least(rows, taken):
    ids = torch.arange(rows * 256).view(rows, 256)
    beside = {"input_ids": ids, "source": torch.full((rows,), -1)}  # counts for nothing
    probes = probe_batches([{"input_ids": ids, "source": torch.zeros(rows).long()}, beside])
    assert sum(len(probe["input_ids"]) for probe in probes) == taken


def test_a_site_whose_inputs_do_not_vary_is_dropped_for_its_probe():
    model = tiny("bert")
    at = sites(model)
    bank = calibrate(model, [tiny_inputs(model, batch=4, tokens=12)], at)
    scores = score(model, bank, at, "obs")
    curves = error_curves(model, bank, at, scores)
    before = probe_sites(model, bank, at, scores, curves, BUDGET)
    constant = bank[at[0].name]
    for fold, total in enumerate(constant.total):  # centred, a rounding error is left
        constant.gram[fold] = (1 - 1e-7) * torch.outer(total, total) / constant.tokens[fold]
    with pytest.raises(InputError, match="not positive definite at damp=0.01"):
        reconstruct(model, bank, before.plan, damp=CURVE_DAMP)
    probes = probe_sites(model, bank, at, scores, curves, BUDGET)
    for site in at:
        weight, bias = probes.weights[site.name]
        if site == at[0]:
            kept = site.features(probes.plan.sites[site.name].kept)
            assert torch.equal(weight, get_consumer_weight(model, site)[:, kept].double())
            assert not torch.equal(bias, get_consumer_bias(model, site).double())
        else:
            assert torch.equal(weight, before.weights[site.name][0])
