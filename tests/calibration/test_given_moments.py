"""``prune(bank=...)``: moments that are there already."""

from __future__ import annotations

import pytest
import torch
from tiny import batches, outputs, tiny

from liar_ext import InputError, calibrate, prune
from liar_ext.calibration import passes


@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_moments_that_are_there_are_not_summed_again(schedule, monkeypatch):
    model, twin = tiny("llama"), tiny("llama")
    data = batches(model)
    bank = calibrate(model, data)
    settings = {"keep": 0.6, "schedule": schedule}
    expected = prune(twin, data, certify_on=batches(model, 2), **settings)
    monkeypatch.setattr(passes, "collect_at", lambda *_, **__: pytest.fail("summed again"))
    report = prune(model, data, bank=bank, **settings)
    assert report.plan == expected.plan
    assert torch.equal(outputs(model), outputs(twin))


def test_a_bank_stays_as_it_was():
    model = tiny("llama")
    bank = calibrate(model, batches(model))
    prune(model, batches(model), keep=0.6, bank=bank, certify_on=batches(model, 2))
    assert len(bank) == 6


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        ({"seed": 5}, {}, "of other weights"),
        ({"intermediate_size": 30}, {}, "0.mlp is missing or of another size"),
        ({}, {"keep_hidden": 0.5}, "keep-hidden"),
    ],
)
def test_moments_of_another_model_are_refused(other, settings, message):
    model = tiny("llama", **other)
    bank = calibrate(tiny("llama"), batches(model))
    before = outputs(model)
    with pytest.raises(InputError, match=message):
        prune(model, batches(model), bank=bank, **settings)
    assert torch.equal(outputs(model), before)
