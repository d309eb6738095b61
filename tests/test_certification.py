"""What is certified is what a brute-force run over fresh text shows."""

from __future__ import annotations

import copy
import json
from collections import deque

import pytest
import torch
from covers import cover
from tiny import batches, read_by_consumers, tiny, tiny_inputs

from liar_ext import InputError, kl_divergence, prune, sites
from liar_ext.models.sites import get_consumer_bias, get_consumer_weight


def fresh(model) -> list[dict]:
    return [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in (91, 92)]


@cover(1, mode=["none", "bias", "linear", "affine"], family=["llama", "bert", "gpt2"])
def test_errors_of_sites_are_those_of_a_run(family, mode):
    dense = tiny(family)
    model, data = copy.deepcopy(dense), fresh(dense)
    recipe = {"reconstruct": mode, "schedule": "one-pass"}
    report = prune(model, batches(dense), 0.7, **recipe, certify_on=data)
    after, read = {site.name: site for site in sites(model)}, read_by_consumers(dense, data)
    for row in report.sites:
        site = next(site for site in sites(dense) if site.name == row.name)
        x = torch.cat([each.flatten(0, -2).double() for each in read[site.name]])
        kept = site.features(report.plan.sites[row.name].kept)
        wanted = x @ get_consumer_weight(dense, site).double().T
        given = x[:, kept] @ get_consumer_weight(model, after[row.name]).double().T
        biases = [get_consumer_bias(m, s) for m, s in ((dense, site), (model, after[row.name]))]
        shift = sum(
            sign * bias.double()
            for sign, bias in zip((1, -1), biases, strict=True)
            if bias is not None
        )
        error = (wanted - given + shift).square().sum() / wanted.square().sum()
        assert row.certified_error == pytest.approx(float(error), rel=1e-4, abs=1e-9), row.name


def watch(module: torch.nn.Module, into: list, *, given: bool) -> None:
    """Collect the first input of a module (``given``), or its output, in float64."""

    def note(_, inputs, output):
        taken = inputs[0] if given else output
        into.append(taken.double())

    module.register_forward_hook(note)


@torch.no_grad()
def test_errors_of_a_walk_are_those_of_a_run():
    """Both streams part after a site by |W x̂ + r − W' x̂_K|, which is what a walk solves for."""
    dense = tiny("llama").double()
    model, data = copy.deepcopy(dense), [{"input_ids": fresh(dense)[0]["input_ids"]}]
    report = prune(model, batches(dense), 0.6, schedule="layerwise", certify_on=data)
    rows = {row.name: row.certified_error for row in report.sites}
    assert any(row.share > 0 for row in report.sites)
    streams = []
    for each in (dense, model):
        found = copy.deepcopy(each)  # hooks stay on the copy
        before, between = [], []
        for block in found.model.layers:
            watch(block.input_layernorm, before, given=True)
            watch(block.post_attention_layernorm, between, given=True)
        watch(found.model.norm, before, given=True)
        found(**data[0])
        streams.append((before, between))
    (h, mid), (h_pruned, mid_pruned) = streams
    for index, block in enumerate(dense.model.layers):
        run, out = copy.deepcopy(dense), []
        given = h_pruned[index]
        run.model.layers[index].register_forward_pre_hook(lambda _, args, g=given: (g, *args[1:]))
        watch(run.model.layers[index].self_attn.o_proj, out, given=False)
        run(**data[0])
        energy = out[0].square().sum()
        error = (mid[index] - mid_pruned[index]).square().sum() / energy
        assert rows[f"{index}.attn"] == pytest.approx(float(error), rel=1e-6), index
        energy = block.mlp(block.post_attention_layernorm(mid_pruned[index])).square().sum()
        error = (h[index + 1] - h_pruned[index + 1]).square().sum() / energy
        assert rows[f"{index}.mlp"] == pytest.approx(float(error), rel=1e-6), index


@pytest.mark.parametrize(
    "choices", [{}, {"schedule": "one-pass"}, {"keep_hidden": 0.8}, {"uniform_layers": True}]
)
def test_the_divergence_is_that_of_the_model_that_comes_out(choices):
    dense = tiny("llama")
    model, data = copy.deepcopy(dense), fresh(dense)
    report = prune(model, batches(dense), keep=0.7, certify_on=data, **choices)
    certified = report.evaluation["certified"]
    assert certified["rows"] == 2 * 4 * 12
    assert certified["divergence"] == pytest.approx(kl_divergence(model, dense, data), rel=1e-4)
    assert all(row.certified_error >= 0 for row in report.sites)


def test_certifying_changes_no_decision_and_no_weight():
    with_fresh, without = tiny("llama"), tiny("llama")
    first = prune(with_fresh, batches(without), 0.7, certify_on=fresh(without))
    second = prune(without, batches(without), 0.7)
    assert first.plan == second.plan
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_fresh.state_dict()[name])


def test_sums_in_groups_give_the_same_errors():
    errors = []
    for memory in (None, 20_000):
        model = tiny("llama")
        choices = {"schedule": "one-pass", "memory": memory, "certify_on": fresh(model)}
        report = prune(model, batches(model), 0.7, **choices)
        errors.append([row.certified_error for row in report.sites])
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)


def test_the_report_tells_certified_from_cross_validated(tmp_path):
    model = tiny("llama")
    report = prune(model, batches(model), 0.7, certify_on=fresh(model))
    assert "certified divergence" in report.summary() and "(certified)" in report.summary()
    page = report.to_markdown()
    assert "| held out | certified |" in page and "Certified: measured on text" in page
    report.save(tmp_path)
    assert json.loads((tmp_path / "liar/report.json").read_text())["evaluation"]["certified"]
    plain = prune(tiny("llama"), batches(model), 0.7)
    assert "ertified" not in plain.to_markdown() + plain.summary()


def test_too_little_text_certifies_nothing():
    model = tiny("llama")
    for count, some in enumerate(([], [{"input_ids": torch.ones(1, 8, dtype=torch.long)}])):
        with pytest.raises(InputError, match=f"certify_on needs at least 2 sequences, got {count}"):
            prune(model, batches(model), 0.7, certify_on=some)


def test_hidden_states_of_two_sizes_are_refused_before_the_model_is_changed():
    model = tiny("mpnet").base_model
    before = model.state_dict()
    with pytest.raises(InputError, match="hidden states, whose size keep_hidden changes"):
        prune(model, batches(model, 4), 0.6, keep_hidden=0.75, certify_on=deque(batches(model, 2)))
    with pytest.raises(InputError, match="rescale compares hidden states"):
        prune(model, batches(model, 4), 0.6, keep_hidden=0.75, rescale=True)
    assert model.state_dict().keys() == before.keys() and not hasattr(model, "liar_plan")
