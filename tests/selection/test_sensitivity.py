"""Sensitivities against pruning each site alone for real, and divergences against their formula."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from covers import cover
from oracle import by_states
from tiny import TINY, outputs, tiny, tiny_inputs

from liar_ext import (
    Budget,
    InputError,
    Plan,
    SitePlan,
    apply_plan,
    calibrate,
    kl_divergence,
    reconstruct,
    score,
    site_divergences,
    sites,
)
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.reconstruction.solve import with_bias
from liar_ext.selection.allocation import probe_plan


def job(family, mode="linear"):
    model = tiny(family)
    at = sites(model)
    data = [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(3)]
    bank = calibrate(model, data, at)
    scores = score(model, bank, at, "wifv")
    plan = probe_plan(at, scores, Budget(0.7), model_type=model.config.model_type)
    plan = with_bias(plan, model, mode)
    weights, _ = reconstruct(model, bank, plan, mode=mode, damp=1e-2)
    return model, data[:2], plan, weights


@cover(1, mode=["linear", "affine"], family=sorted(TINY))
def test_equal_to_pruning_each_site_for_real(family, mode):
    if family == "gemma3":
        pytest.skip("the same blocks as gemma3_text")
    model, data, plan, weights = job(family, mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = site_divergences(model, data, plan, weights)
    assert list(got) == list(plan.sites)
    for name in ("0.attn", "1.mlp", "2.attn"):
        pruned = copy.deepcopy(model)
        alone = replace(plan, sites={name: plan.sites[name]})
        apply_plan(pruned, alone, {name: weights[name]})
        want = kl_divergence(pruned, model, data)
        assert want > 0 and got[name] == pytest.approx(want, rel=1e-3, abs=1e-7)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_before_the_site_do_not_run_again():
    model, data, plan, weights = job("llama")
    runs = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):

        def count(module, arguments, index=index):
            runs[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    site_divergences(model, data[:1], plan, weights)
    assert runs == [1 + 2, 1 + 4, 1 + 6]
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_a_site_that_keeps_everything_loses_nothing():
    model, data, plan, weights = job("llama")
    whole = replace(plan.sites["1.mlp"], kept=tuple(range(24)))
    plan = replace(plan, sites={**plan.sites, "1.mlp": whole})
    assert site_divergences(model, data, plan, weights)["1.mlp"] == 0.0


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "distilbert"])
def test_outputs_are_compared_at_tokens_spread_over_the_real_ones(family):
    model, other = tiny(family), tiny(family, seed=1)
    inputs = tiny_inputs(model, batch=3, tokens=14)
    inputs["attention_mask"][:, 12:] = 0
    inputs["attention_mask"][0, 6:] = 0
    got = DenseOutputs(model, inputs, 4)
    counts = inputs["attention_mask"].clone()
    counts[:, [column for column in range(14) if column not in (1, 4, 7, 10)]] = 0
    rows = counts.bool()
    p, q = outputs(model, inputs).double(), outputs(other, inputs).double()
    if family == "distilbert":
        want = by_states(p, q, rows, inputs["attention_mask"])
    else:
        want = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1)))[rows].sum()
    assert int(rows.sum()) == 10 and len(got) == (20 if family == "distilbert" else 10)
    assert got.divergence(other) == pytest.approx(float(want), rel=1e-5)
    assert got.divergence(model) == 0.0


@torch.no_grad()
def test_the_head_runs_where_outputs_are_compared_only():
    model = tiny("llama")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for positions in (4, 12, 13, None):
        DenseOutputs(model, tiny_inputs(model, tokens=12), positions)
    assert seen == [4, 12, 12, 12]


def test_kl_divergence_equals_its_formula():
    model, other = tiny("llama"), tiny("llama", seed=1)
    inputs = tiny_inputs(model, batch=3)
    inputs["attention_mask"][1, 5:] = 0
    p = outputs(model, inputs).double().softmax(-1)
    q = outputs(other, inputs).double().softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    want = float(each[inputs["attention_mask"].bool()].mean())
    assert kl_divergence(other, model, [inputs]) == pytest.approx(want, rel=1e-5)
    assert kl_divergence(model, model, [inputs]) == 0.0


def test_models_without_logits_are_compared_by_their_hidden_states():
    model, other = tiny("distilbert"), tiny("distilbert", seed=1)
    inputs = tiny_inputs(model)
    p, q = outputs(model, inputs), outputs(other, inputs)
    every = torch.ones(p.shape[:2])
    want = by_states(p, q, every) / (2 * every.sum())
    assert kl_divergence(other, model, [inputs]) == pytest.approx(float(want), rel=1e-5)


def test_no_batch_is_refused():
    model, _, plan, weights = job("llama")
    with pytest.raises(InputError, match="must be finite, got none"):
        site_divergences(model, [], plan, weights)
    with pytest.raises(InputError, match="weights are missing for 0.attn"):
        site_divergences(model, [], plan, {})
    with pytest.raises(InputError, match="0.mlp has 24 units, the plan counts 48"):
        site_divergences(model, [], Plan("llama", "auto", {"0.mlp": SitePlan(48, (40,))}), {})
    with pytest.raises(InputError, match="needs at least one batch"):
        kl_divergence(model, model, [])


def test_labels_are_no_matter_of_divergence():
    """Outputs are compared at some positions, and labels stand at all of them."""
    model, (batch, *_), plan, weights = job("llama")
    long = {key: value.repeat(1, 30)[:, :300] for key, value in batch.items()}
    model.config.max_position_embeddings = 300
    labelled = {**long, "labels": long["input_ids"]}
    assert site_divergences(model, [labelled], plan, weights) == site_divergences(
        model, [long], plan, weights
    )
