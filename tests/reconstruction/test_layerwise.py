from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from covers import some
from tiny import TINY, outputs, seen_at, tiny, tiny_inputs

from liar_ext import (
    Budget,
    InputError,
    allocate,
    apply_plan,
    calibrate,
    prune,
    reconstruct,
    reconstruct_layerwise,
    score,
    sites,
)
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.solve import with_bias
from liar_ext.reconstruction.streams import InMemory, Walk
from liar_ext.reconstruction.walk import LayerwiseSolver

FAMILIES = ["llama", "gemma3_text", "bert", "mpnet", "opt", "gpt2", "gpt_neox", "vit", "dinov2"]
PLAIN = "llama mistral qwen2 qwen3 smollm3 opt gpt2 gpt_neox vit".split()
NORMED = "bert roberta distilbert mpnet".split()  # the norm after the sum


def batches(model, count=4, tokens=12):
    data = [tiny_inputs(model, batch=6, tokens=tokens, seed=seed) for seed in range(count)]
    if "attention_mask" in data[0]:
        data[1]["attention_mask"][2, 5:] = 0
    return data


def plan_for(model, data, keep=0.7, mode="linear"):
    at = sites(model)
    scores = score(model, calibrate(model, data, at), at, "wifv")
    total = sum(site.params for site in at)
    budget = Budget(keep)
    plan = allocate(at, scores, budget, model_type=model.config.model_type, total=total)
    return with_bias(plan, model, mode)


def walk_blocks(model, data, plan, steps, mode="linear", damp="auto"):
    """Take a walk over the first blocks, and return it with the blocks still open."""
    walk = Walk(InMemory(model), plan.attn_unit)
    context = walk.blocks.opened()
    context.__enter__()
    walk = LayerwiseSolver(walk, plan, mode, damp)
    walk.start(data)
    for index in range(steps):
        walk.step(index)
    return walk, context


def stream_after(model, block, inputs):
    """Return what leaves a block in the model's own forward."""
    path = next(site.path for site in sites(model) if site.block == block)
    _, output = seen_at(model, [path], inputs)[path]
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_streams_are_those_of_the_dense_and_the_pruned_model(name):
    model = tiny(name, dtype=torch.float64)
    mode = "affine" if name == "gpt2" else "linear"
    data = batches(model)
    plan = plan_for(model, data, mode=mode)
    walk, context = walk_blocks(model, data, plan, 3, mode)
    context.__exit__(None, None, None)
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan, walk.weights)
    for part in walk.parts[:3]:
        after = stream_after(pruned, 2, part.batch.inputs)
        assert torch.allclose(part.states["pruned"].get(), after, rtol=1e-9, atol=1e-10)
        assert torch.equal(part.states["dense"].get(), stream_after(model, 2, part.batch.inputs))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_first_site_is_the_one_pass_solution(name):
    model = tiny(name)
    data = batches(model)
    plan = plan_for(model, data)
    bank = calibrate(model, data, sites(model))
    one_pass, rows = reconstruct(model, bank, plan)
    walked, walked_rows = reconstruct_layerwise(model, data, plan)
    assert torch.allclose(walked["0.attn"][0], one_pass["0.attn"][0], rtol=1e-4, atol=1e-5)
    assert walked_rows[0].holdout_error == pytest.approx(rows[0].holdout_error, rel=1e-4)
    assert [row.name for row in walked_rows] == list(plan.sites)


def test_sites_that_lose_nothing_are_kept():
    model = tiny("llama")
    data = batches(model)
    plan = plan_for(model, data)
    whole = {"2.mlp": replace(plan.sites["2.mlp"], kept=tuple(range(24)))}
    plan = replace(plan, sites={**plan.sites, **whole})
    dense = model.model.layers[2].mlp.down_proj.weight.double()
    kept, rows = reconstruct_layerwise(model, data, plan)
    assert torch.equal(kept["2.mlp"][0], dense) and rows[-1].path == "kept as it is"


def test_infinite_damp_is_dropping():
    model = tiny("llama")
    data = batches(model)
    plan = plan_for(model, data)
    weights, _ = reconstruct_layerwise(model, data, plan, damp=math.inf)
    for site in sites(model):
        dense = model.get_submodule(site.consumer).weight.double()
        kept = site.features(plan.sites[site.name].kept)
        assert torch.equal(weights[site.name][0], dense[:, kept])


@pytest.mark.parametrize("name", TINY)
def test_a_target_that_the_block_cannot_have_is_replaced_aloud(name):
    model = tiny(name)
    data = batches(model)
    plan = plan_for(model, data)
    _, rows = reconstruct_layerwise(model, data, plan)
    plain = name in PLAIN + NORMED
    assert {row.target for row in rows} == {"stream" if plain else "branch"}
    assert all(("branch, as the stream" in row.path) != plain for row in rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "gemma3_text"])
def test_half_precision_tells_a_plain_sum_by_its_rounding(name, dtype):
    model = tiny(name, dtype=dtype)
    data = batches(model)
    weights, rows = reconstruct_layerwise(model, data, plan_for(model, data))
    assert {row.target for row in rows} == {"stream" if name in PLAIN + NORMED else "branch"}
    assert all(torch.isfinite(weight).all() for weight, _ in weights.values())


# Where a norm follows the sum, the stream that is brought nearer is the sum before it.
@some("name", ["llama", "bert", "mpnet"], "llama", "mpnet")
def test_the_stream_target_brings_the_stream_nearer(name, monkeypatch):
    model = tiny(name)
    data = batches(model, count=16)
    plan = plan_for(model, data)
    distance = []
    for _ in range(2):
        walk, context = walk_blocks(model, data, plan, 3)
        context.__exit__(None, None, None)
        distance += [
            sum(
                float(
                    (stream_after(model, 2, part.batch.inputs) - part.states["pruned"].get())
                    .detach()
                    .square()
                    .sum()
                )
                for part in walk.parts
            )
        ]
        monkeypatch.setattr(LayerwiseSolver, "_target_at", lambda self, site: "branch")
    assert distance[0] < distance[1]


def test_a_thousand_tokens_are_survived():
    model = tiny("llama")
    data = [tiny_inputs(model, batch=4, tokens=25, seed=seed) for seed in range(10)]
    report = prune(model, data, 0.7, schedule="layerwise")
    assert report.settings["calibration_tokens"] == 1000
    assert all(0 <= row.share <= 1 and math.isfinite(row.holdout_error) for row in report.sites)


@pytest.mark.parametrize("mode", ["linear", "affine"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_whole_job(name, mode):
    model = tiny(name)
    data = batches(model)
    settings = {"allocation": "uniform", "reconstruct": mode}
    report = prune(model, iter(data), 0.7, schedule="layerwise", **settings)
    assert report.settings["schedule"] == "layerwise"
    assert {row.path.split(",")[0] for row in report.sites} == {mode}
    assert torch.isfinite(outputs(model)).all()
    assert "| stream |" in report.to_markdown() or "stream |" in report.to_markdown()


def test_the_model_is_not_changed_even_by_a_failure():
    model = tiny("llama")
    data = batches(model)
    plan = plan_for(model, data)
    before = outputs(model)
    reconstruct_layerwise(model, data, plan)
    with pytest.raises(InputError, match=r"both folds need text"):
        reconstruct_layerwise(model, [{**data[0], "fold": torch.zeros(6)}], plan)
    with pytest.raises(InputError, match=r"both folds need text"):
        reconstruct_layerwise(model, [], plan)
    assert torch.equal(outputs(model), before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "backwards"}, "schedule must be one of auto, one-pass, layerwise"),
        ({"schedule": "layerwise", "reconstruct": "bias"}, "must be auto, linear or affine"),
        ({"schedule": "layerwise", "reconstruct": "none"}, "must be auto, linear or affine"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(arguments, message):
    def no_batch():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(InputError, match=message):
        prune(tiny("llama"), no_batch(), **arguments)


def test_a_plan_for_another_model_is_refused():
    model = tiny("llama")
    data = batches(model)
    plan = plan_for(model, data)
    with pytest.raises(InputError, match="every site of the plan, missing 2.attn, 2.mlp"):
        reconstruct_layerwise(tiny("llama", num_hidden_layers=2), data, plan)


@pytest.mark.parametrize(
    ("name", "runs"), [("llama", 2), ("gpt_neox", 2), ("bert", 2), ("gemma3_text", 3)]
)
def test_a_block_of_sums_is_not_run_again_to_pass_it(name, runs, monkeypatch):
    seen = []
    run = Blocks.run

    def noting(self, index, inputs, hidden, consumers=None, end=None):
        if consumers is not None and len(hidden) > 1:  # of the pruned model; one row is a trial
            seen.append(index)
        return run(self, index, inputs, hidden, consumers, end)

    model = tiny(name, dtype=torch.float64)
    data = batches(model)
    plan = plan_for(model, data)
    monkeypatch.setattr(Blocks, "run", noting)
    walk, context = walk_blocks(model, data, plan, 2)
    context.__exit__(None, None, None)
    assert seen.count(0) == seen.count(1) == runs * len(walk.parts)
