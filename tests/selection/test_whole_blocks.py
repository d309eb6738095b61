"""Which blocks go, and what is made up for: by hand, and in whole jobs."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from covers import slow, some
from tiny import batches, outputs, same_weights, seen_at, tiny

from liar_ext import InputError, load_pruned, prune, save_pruned, sites, verify_pruned
from liar_ext.calibration.batches import read_batch
from liar_ext.calibration.divergence import Divergence
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.slicing import apply_plan
from liar_ext.models.whole import check_block_count
from liar_ext.reconstruction.ridge import LayerSums
from liar_ext.reconstruction.solve import solve
from liar_ext.selection.error_curves import probes_of
from liar_ext.selection.sensitivity import POSITIONS
from liar_ext.selection.whole_blocks import choose_blocks

DEEP = {"num_hidden_layers": 6}


def shorter(model: torch.nn.Module, gone: set[int]) -> torch.nn.Module:
    fewer = copy.deepcopy(model)
    kept = SitePlan(6, tuple(at for at in range(6) if at not in gone))
    apply_plan(fewer, Plan(model.config.model_type, "auto", {}, blocks=kept))
    return fewer


@pytest.mark.parametrize("name", ["llama", "dinov2", "gpt_neox", "mixtral"])
def test_blocks_go_one_by_one_by_what_the_output_loses(name: str) -> None:
    model, gone, expected = tiny(name, seed=3, **DEEP), set(), {}
    data = batches(model, 4)
    found = choose_blocks(model, data, 0.5, mode="none")
    judge = Divergence(model, probes_of(model, data), POSITIONS)
    for _ in range(3):
        losses = {
            block: judge.of(shorter(model, {*gone, block}))["divergence"]
            for block in range(1, 6)
            if block not in gone
        }
        block = min(losses, key=losses.get)
        expected[block] = losses[block]
        gone.add(block)
    assert list(found.divergences) == list(expected)
    assert found.divergences == pytest.approx(expected, rel=1e-4)
    assert found.plan.kept == tuple(at for at in range(6) if at not in gone)
    assert not found.weights and found.rows[0].damp == math.inf
    assert same_weights(model, tiny(name, seed=3, **DEEP))


def reads(model: torch.nn.Module, path: str, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer reads and gives in the model's own forward."""
    (x, *_), y = seen_at(model, [path], inputs)[path]
    return x, y


@pytest.mark.parametrize("name", ["llama", "bert"])
@torch.no_grad()
def test_consumers_are_solved_for_the_stream_behind_the_gap(name: str, monkeypatch) -> None:
    """Each on what those before it give, by sums over the model's own forward passes."""
    model = tiny(name, dtype=torch.float64, **DEEP)
    data = batches(model, 4)
    monkeypatch.setattr(
        "liar_ext.selection.whole_blocks._choose", lambda *_: {2: 0.1, 3: 0.2, 5: 0.3}
    )
    found = choose_blocks(model, data, 0.5)
    at = {site.name: site for site in sites(model)}
    order = ["1.attn", "1.mlp", "4.attn", "4.mlp"]
    assert [each.removeprefix("dense.") for each in found.weights] == order
    pruned = shorter(model, {2, 3, 5})
    own, left = {site.name: site for site in sites(pruned)}, []
    for now, dense, behind in (
        ("1.attn", "1.attn", "1.attn"),
        ("1.mlp", "1.mlp", "3.mlp"),
        ("2.attn", "4.attn", "4.attn"),
        ("2.mlp", "4.mlp", "5.mlp"),
    ):
        site, sums = own[now], LayerSums.zeros(own[now], torch.device("cpu"))
        goals = []
        for batch in data:
            x, _ = reads(pruned, site.consumer, batch)
            goal = stream(model, name, at[behind], batch)
            r = (goal - stream(pruned, name, site, batch)).flatten(0, 1)
            weights = torch.ones(len(r), dtype=torch.float64)
            if name == "bert":
                summed = stream(pruned, name, site, batch).flatten(0, 1)
                weights = 1 / (summed.var(-1, correction=0) + 1e-6)
            goals.append((batch, goal.flatten(0, 1), weights))
            for fold in (0, 1):
                rows = (read_batch(batch).fold == fold).repeat_interleave(x.shape[1])
                sums.add((x.flatten(0, 1)[rows], r[rows], weights[rows]), fold)
        layer = pruned.get_submodule(site.consumer)
        mode = "linear" if layer.bias is None else "affine"
        settings = {"target": sums.residual, "step": (0.0, 1.0), "mode": mode, "damp": "auto"}
        every = torch.arange(site.d_in)
        expected = solve(layer.weight, layer.bias, sums.moments, every, **settings)
        weight, bias = found.weights[f"dense.{dense}"]
        torch.testing.assert_close(weight, expected.weight, rtol=1e-6, atol=1e-8)
        layer.weight.copy_(weight)
        if bias is not None:
            torch.testing.assert_close(bias, expected.bias, rtol=1e-6, atol=1e-8)
            layer.bias.copy_(bias)
        if dense != behind:
            after = 0.0
            for batch, goal, each in goals:
                missing = goal - stream(pruned, name, site, batch).flatten(0, 1)
                after += float((each * missing.square().sum(-1)).sum())
            left.append(after / float(sums.residual.energy.sum()))
    assert found.rows[0].error == pytest.approx(sum(left) / 2, rel=1e-6)


def stream(model: torch.nn.Module, name: str, site, inputs: dict) -> torch.Tensor:
    """Return the stream after a site, before the norm that reads it."""
    if name == "bert":
        norm = "attention.output.LayerNorm" if site.kind == "attn" else "output.LayerNorm"
        return reads(model, f"{site.path}.{norm}", inputs)[0]
    if site.kind == "attn":
        return reads(model, f"{site.path}.post_attention_layernorm", inputs)[0]
    output = reads(model, site.path, inputs)[1]
    return output[0] if isinstance(output, tuple) else output


@some("name", ["llama", "gpt2", "bert", "gemma3_text", "mixtral", "vit"], "llama", "bert")
def test_whole_jobs(name: str, tmp_path: Path) -> None:
    dense, model = tiny(name, **DEEP), tiny(name, **DEEP)
    report = prune(model, batches(model, 4), 1.0, keep_blocks=0.67)
    row = report.sites[0]
    assert (row.name, row.units_before, row.units_after) == ("blocks", 6, 4)
    assert row.params_before - row.params_after == report.params["before"] - report.params["after"]
    assert "plain" in report.loading and not report.plan.sites
    assert "of the blocks" in report.verdict().rows[0][1] and report.worst_layer() is None
    assert any(line.startswith("blocks") and row.path in line for line in report.lines())
    assert sorted(report.settings["blocks_gone"]) == sorted(report.plan.blocks.removed)
    save_pruned(model, tmp_path / "one", report.plan, report=report)
    stock = type(model).from_pretrained(tmp_path / "one").eval()
    assert torch.equal(outputs(stock), outputs(model))
    assert verify_pruned(tmp_path / "one")["agrees"]
    apply_plan(dense, report.plan)
    assert not torch.equal(outputs(dense), outputs(model)) or name == "gemma3_text"
    again = prune(model, batches(model, 4), 0.7, tile=1)
    assert again.plan.blocks == report.plan.blocks
    assert {int(each.partition(".")[0]) for each in again.plan.sites} == set(range(4))


@pytest.mark.parametrize(
    "choices",
    [
        {"keep": 0.7, "schedule": "layerwise"},
        slow({"keep": 0.7, "preset": "fast"}),
        slow({"keep": 0.7, "preset": "wanda-sp"}),
        {"keep": 1.0, "keep_hidden": 0.8},
        {"keep": 0.8, "keep_hidden": 0.8, "rescale": True},
    ],
)
def test_blocks_and_then_more_leave(choices: dict, tmp_path: Path) -> None:
    model = tiny("llama", **DEEP)
    report = prune(model, batches(model, 4), keep_blocks=0.67, **choices)
    save_pruned(model, tmp_path / "one", report.plan, report=report)
    assert torch.equal(outputs(load_pruned(tmp_path / "one")), outputs(model))
    assert len(model.model.layers) == 4
    again = tiny("llama", **DEEP)
    apply_plan(again, report.plan)
    assert [each.shape for each in again.parameters()] == [e.shape for e in model.parameters()]


def test_experts_are_numbered_in_the_blocks_that_stay() -> None:
    model = tiny("mixtral", **DEEP)
    report = prune(model, batches(model, 2), 1.0, keep_blocks=0.67, keep_experts=0.75)
    assert set(report.plan.experts) == {f"{at}.mlp" for at in range(4)}
    assert {len(layer.mlp.experts.down_proj) for layer in model.model.layers} == {3}


def test_solving_brings_the_model_nearer() -> None:
    """What a block gives is there in the input of the consumer before it."""
    found = []
    for mode in ("none", "auto"):
        model = tiny("llama", seed=5, **DEEP)
        data = batches(model, 40)
        judge = Divergence(model, batches(model, 44)[40:])
        prune(model, data, 1.0, keep_blocks=0.67, reconstruct=mode)
        found.append(judge.of(model)["divergence"])
    assert found[1] < 0.9 * found[0]


def test_the_last_block_with_attention_stays() -> None:
    """Without one, the caches of transformers don't count tokens, and no model runs."""
    model = tiny("bamba")
    with torch.no_grad():  # what would go first
        block = model.model.layers[1]
        block.self_attn.o_proj.weight.zero_()
        block.feed_forward.down_proj.weight.zero_()
    with pytest.raises(InputError, match="the first one, which has no attention"):
        prune(model, batches(model), keep=1, keep_blocks=0.4)
    report = prune(model, batches(model), keep=1, keep_blocks=0.7)
    assert report.plan.blocks.kept == (0, 1)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] > 2


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_a_norm_behind_each_layer_brings_a_warning(name: str) -> None:
    model = tiny(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prune(model, batches(model), keep=1, keep_blocks=0.67)
    told = [str(each.message) for each in said if "keep_blocks: a norm" in str(each.message)]
    assert len(told) == (name != "llama") and all(f"layer of {name} gives" in each for each in told)


def test_a_model_whose_blocks_depend_on_their_place_is_refused() -> None:
    model = tiny("gpt2", seed=2, scale_attn_by_inverse_layer_idx=True, n_layer=6)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="scaling of a GPT2Attention is 0.11.*, not 0.08"):
        prune(model, batches(model, 2), 1.0, keep_blocks=0.5)
    assert same_weights(model, before) and len(model.transformer.h) == 6
    model = tiny("llama", **DEEP)
    found = choose_blocks(model, batches(model, 2), 0.5, mode="none")
    gone = set(found.plan.removed)
    found.check(shorter(model, gone))
    with pytest.raises(InputError, match="give something else in another place"):
        found.check(shorter(model, gone - {max(gone)}))


def test_what_no_config_says_and_what_overflows_is_refused(monkeypatch) -> None:
    model = tiny("llama", tie_word_embeddings=False, **DEEP)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(InputError, match="without any one block the outputs are not finite"):
        choose_blocks(model, batches(model, 2), 0.5)

    def strict(fields: dict) -> None:
        raise ValueError(f"{fields['num_hidden_layers']} layers are too few")

    model = tiny("llama", **DEEP)
    monkeypatch.setattr(type(model.config), "from_dict", strict)
    message = "no config of 'llama' says these blocks alone: 4 layers are too few"
    with pytest.raises(InputError, match=message):
        apply_plan(model, Plan("llama", "auto", {}, blocks=SitePlan(6, (0, 1, 2, 5))))
    with pytest.raises(InputError, match=message):  # before anything is measured
        check_block_count(model, 0.67)
    assert len(model.model.layers) == 6


def test_a_job_that_goes_on_has_the_same_bits(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = tiny("llama", **DEEP)
        choices = {"keep_blocks": 0.67, "schedule": "layerwise", "checkpoint": tmp_path}
        prune(model, batches(model, 4), 0.7, **choices)
        found.append(model)
    assert same_weights(*found)
