"""Gram matrices of all linear layers, for a quantiser, against brute force."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy

import pytest
import torch
from tiny import batches, tiny

from liar_ext import InputError, prune, sites
from liar_ext.calibration.taps import watched
from liar_ext.integrations.linear_grams import calibrate_linears, linear_grams


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "opt", "gemma3_text", "qwen3_5_text"])
def test_grams_are_those_of_the_dense_inputs_that_stay(name):
    model = tiny(name)
    rows = batches(model, 2)
    rows[0]["attention_mask"][:, 12:] = 0
    linears = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".layer" in path
    }
    expected = {path: 0 for path in linears}
    for batch in rows:
        keep = batch["attention_mask"].flatten().bool()

        def add(path, keep=keep):
            def callback(args, _):
                x = args[0].flatten(0, -2)[keep].double()
                expected[path] = expected[path] + x.T @ x

            return callback

        with ExitStack() as stack, torch.no_grad():
            for path, layer in linears.items():
                stack.enter_context(watched(layer, add(path)))
            model(**batch)

    at = sites(model)
    bank = calibrate_linears(model, rows, at)
    alone = deepcopy(model)
    plan = prune(model, rows, keep=0.6, bank=bank).plan
    assert plan == prune(alone, rows, keep=0.6).plan
    for path, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[path], value)
    grams = linear_grams(bank, at, plan)
    assert grams.keys() == linears.keys()
    features = {site.consumer: site.features(plan.sites[site.name].kept) for site in at}
    for path, gram in grams.items():
        kept = features.get(path, torch.arange(linears[path].in_features))
        if path not in features:
            assert gram.shape[0] == linears[path].in_features
        wanted = expected[path][kept][:, kept].float()
        torch.testing.assert_close(gram, wanted, rtol=1e-4, atol=1e-4)
        assert model.get_submodule(path).weight.shape[1] == len(gram)


def test_layers_that_are_not_linear_are_refused():
    model = tiny("gpt2")
    with pytest.raises(InputError, match=r"must be torch\.nn\.Linear, got Conv1D"):
        calibrate_linears(model, batches(model, 1), sites(model))


def test_grams_that_do_not_fit_are_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="raise memory"):
        calibrate_linears(model, batches(model, 1), sites(model), memory=1000)
