"""Where a norm reads what a consumer gives, tokens count relative to that: against brute force."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from tiny import TINY, seen_at, tiny, tiny_inputs
from tiny_decoders import DECODERS

from liar_ext import InputError, MomentBank, calibrate, prune, sites
from liar_ext.calibration.taps import is_relative, relative_weights

NORMED = ("gemma3_text", "olmo2", "exaone4", "glm4")


@torch.no_grad()
@pytest.mark.parametrize("family", sorted({*TINY, *DECODERS}))
def test_the_norms_that_families_name_read_what_consumers_give(family):
    model = tiny(family)
    at = [site for site in sites(model) if site.expert is None]  # those of experts are no modules
    named = model.named_modules()
    norms = [name for name, module in named if "norm" in type(module).__name__.lower()]
    seen = seen_at(model, norms + [site.consumer for site in at], tiny_inputs(model))
    read = {name: seen[name][0][0] for name in norms if name in seen}
    for site in at:
        _, output = seen[site.consumer]
        same = [
            name.removeprefix(f"{site.path}.")
            for name, x in read.items()
            if name.startswith(f"{site.path}.")
            and x.numel() == output.numel()
            and torch.equal(x.flatten(), output.flatten())
        ]
        assert same == [site.wiring.output_norm] * bool(site.wiring.output_norm), site.name


@pytest.mark.parametrize("family", NORMED)
def test_sums_are_those_of_tokens_by_what_is_given(family):
    model = tiny(family, dtype=torch.float64)
    data = tiny_inputs(model, batch=4, tokens=10)
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][1, 7:] = 0
    found = seen_at(model, [site.consumer for site in sites(model)], data)
    bank = calibrate(model, [data])
    assert bank.source["tokens"] == int(data["attention_mask"].sum()) == 37
    for site in sites(model):
        assert is_relative(site)
        (x,), y = found[site.consumer]
        weight = data["attention_mask"] / (y.square().mean(-1) + 1e-6)
        for fold in (0, 1):
            rows, each = x[fold::2].flatten(0, 1), weight[fold::2].flatten()
            sums = bank[site.name]
            gram = (rows * each[:, None]).mT @ rows
            torch.testing.assert_close(sums.gram[fold].tril(), gram.tril())
            torch.testing.assert_close(sums.total[fold], each @ rows)
            torch.testing.assert_close(sums.tokens[fold], each.sum())


def test_weights_of_tokens():
    y = torch.tensor([[3.0, 4.0], [0.0, 10.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    assert relative_weights(y).tolist() == pytest.approx([2 / 25, 1 / 50, 1e6, 1.0, 1.0], rel=1e-5)


def test_a_token_counts_alike_however_large_what_it_gives_is():
    torch.manual_seed(0)
    x, weight = torch.randn(12, 5), torch.randn(3, 5)
    scale = 10.0 ** torch.randint(0, 4, (12, 1))
    sums = []
    for factor in (1.0, scale):
        rows = (x * factor).double()
        each = relative_weights((x * factor) @ weight.mT)[:, None]
        sums.append((each * rows).mT @ rows)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_job_keeps_counting_tokens(dtype):
    model = tiny("gemma3_text", dtype=dtype)
    data = [tiny_inputs(model, batch=4, tokens=16, seed=seed) for seed in range(3)]
    data[0]["attention_mask"] = torch.ones_like(data[0]["input_ids"])
    data[0]["attention_mask"][0, 9:] = 0
    report = prune(model, data, keep=0.5)
    assert report.settings["calibration_tokens"] == 3 * 64 - 7


def test_a_bank_says_how_its_tokens_count(tmp_path):
    model = tiny("gemma3_text")
    data = [tiny_inputs(model, batch=4, seed=seed) for seed in range(2)]
    bank = calibrate(model, data[:1])
    bank.save(tmp_path / "bank")
    bank = MomentBank.load(tmp_path / "bank")
    assert bank.source["relative"] == sorted(site.name for site in sites(model))
    other = calibrate(model, data[1:])
    prune(deepcopy(model), None, bank=bank, keep=0.5)
    del other.source["relative"]
    with pytest.raises(InputError, match=r"MomentBank\.merge: .*got relative"):
        bank.merge(other)
    with pytest.raises(InputError, match="without weights for tokens .*; calibrate the model"):
        prune(model, None, bank=other, keep=0.5)
    assert "relative" not in calibrate(tiny("llama"), data).source
