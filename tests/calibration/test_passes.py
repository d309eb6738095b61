"""Sites whose sums do not fit the memory together are taken in groups, a pass each."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from covers import cover
from tiny import batches, outputs, tiny

from liar_ext import InputError, calibrate, prune, sites
from liar_ext.calibration import collect as calibration
from liar_ext.calibration.collect import Passes
from liar_ext.calibration.saved_sums import group_sites, split


def bytes_of_most(model) -> int:
    """Return what the sums of the widest site take: both folds in float64."""
    return 16 * max(site.d_in for site in sites(model)) ** 2


def assert_same(ours, theirs) -> None:
    """Same weights bit for bit, same rows; ``ours`` and ``theirs`` are (model, report)."""
    for name, tensor in theirs[0].state_dict().items():
        assert torch.equal(ours[0].state_dict()[name], tensor), name
    assert ours[1].plan == theirs[1].plan
    for mine, other in zip(ours[1].sites, theirs[1].sites, strict=True):
        assert replace(mine, seconds=0.0) == replace(other, seconds=0.0)


@cover(
    1,
    settings=[
        {},
        {"schedule": "one-pass"},
        {"allocation": "global", "reconstruct": "affine", "schedule": "one-pass"},
        {"criterion": "taylor", "allocation": "uniform"},
    ],
    name=["llama", "gpt2", "opt"],
)
def test_the_result_is_the_same_bit_for_bit(name, settings):
    model = tiny(name)
    data = batches(model)
    whole, parts = (model, copy.deepcopy(model))
    report = prune(whole, data, 0.7, **settings)
    memory = int(2.2 * bytes_of_most(parts))
    groups = len(group_sites(sites(parts), memory))
    assert 1 < groups < len(sites(parts))
    in_parts = prune(parts, data, 0.7, memory=memory, **settings)
    assert_same((parts, in_parts), (whole, report))
    # What is measured is solved in one pass, too.
    passes = 2 * groups - 1
    assert report.settings.pop("calibrate_passes") == 1
    assert in_parts.settings.pop("calibrate_passes") == passes
    assert in_parts.settings == report.settings
    assert in_parts.seconds.keys() == report.seconds.keys()


def test_narrowing_has_the_same_bound():
    whole, parts = tiny("llama"), tiny("llama")
    data = batches(whole)
    report = prune(whole, data, 0.7, keep_hidden=0.8)
    in_parts = prune(parts, data, 0.7, keep_hidden=0.8, memory=1)
    assert_same((parts, in_parts), (whole, report))
    assert in_parts.settings["narrow_passes"] == 8 and in_parts.settings["calibrate_passes"] == 6


@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_the_sums_of_a_pass_are_within_the_memory(schedule, watch_sums):
    model = tiny("llama")
    memory = bytes_of_most(model)
    held = watch_sums(calibration)
    prune(model, batches(model), 0.7, memory=memory, schedule=schedule)
    assert max(held) == memory and len(held) > 1


def test_a_pass_ends_at_its_last_site():
    model = tiny("llama")
    ran = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    at = sites(model)
    first = [site for site in at if site.block == 0]
    assert calibrate(model, batches(model, 1), first)[first[0].name].tokens.sum() > 0
    assert ran == []  # not even block 0 to its end
    calibrate(model, batches(model, 1), at)
    assert ran == list(range(len(model.model.layers) - 1))


def test_batches_that_can_be_read_only_once_are_kept():
    model = tiny("llama")
    data = batches(model)
    passes = Passes(model, iter(data), sites(model), bytes_of_most(model))
    whole = calibrate(model, data)
    for way in (passes, passes.back()):
        for group in way:
            assert passes.bank.keys() == {site.name for site in group}
            for site in group:
                assert torch.equal(passes.bank[site.name].gram, whole[site.name].gram)
    assert len(passes.summed) == 2 * len(passes.groups) - 1


@pytest.mark.parametrize(
    ("sizes", "limit", "runs"),
    [
        ([], 5, []),
        ([3], 1, [[0]]),
        ([1, 1, 1], 3, [[0, 1, 2]]),
        ([2, 2, 2], 3, [[0], [1], [2]]),
        ([1, 9, 1, 1], 2, [[0], [1], [2, 3]]),
        ([2, 1, 2, 1], 3, [[0, 1], [2, 3]]),
    ],
)
def test_runs_are_as_long_as_the_limit_allows(sizes, limit, runs):
    assert [list(run) for run in split(range(len(sizes)), sizes, limit)] == (runs or [[]])


def test_bad_memory_is_refused_at_once():
    model = tiny("llama")
    with pytest.raises(
        InputError, match="memory must be a number and a unit, such as 12GiB or 500MB, got 0"
    ):
        prune(model, [], 0.7, memory=0)


@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_moments_that_are_there_are_not_summed_again(schedule, monkeypatch):
    model, twin = tiny("llama"), tiny("llama")
    data = batches(model)
    bank = calibrate(model, data)
    settings = {"keep": 0.6, "schedule": schedule}
    expected = prune(twin, data, certify_on=batches(model, 2), **settings)
    again = "liar_ext.calibration.collect.collect"
    monkeypatch.setattr(again, lambda *_, **__: pytest.fail("summed again"))
    report = prune(model, data, bank=bank, **settings)
    assert report.plan == expected.plan
    assert torch.equal(outputs(model), outputs(twin))


def test_a_bank_that_does_not_say_its_config():
    """As those of older versions."""
    model = tiny("llama")
    bank = calibrate(model, batches(model))
    del bank.source["config"]
    prune(model, bank=bank, preset="fast")


def test_a_bank_stays_as_it_was():
    model = tiny("llama")
    bank = calibrate(model, batches(model))
    prune(model, batches(model), keep=0.6, bank=bank, certify_on=batches(model, 2))
    assert len(bank) == 6


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        ({"seed": 5}, {}, "of other weights"),
        ({"hidden_act": "relu"}, {}, "of a model with another config"),
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
