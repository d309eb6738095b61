"""What experts that stay are multiplied by, against sliced models and planted ones."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from test_whole_experts import (
    alone,
    chosen_of,
    collected,
    eager,
    layer_outputs,
    pruned_outputs,
    text,
)
from tiny import MOE, outputs, tiny, tiny_inputs
from torch import Tensor, nn

from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.divergence import Divergence
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.slicing import apply_plan
from liar_ext.reconstruction.streams import InMemory, Walk
from liar_ext.selection.expert_scales import (
    PLAIN,
    POWERS,
    Chosen,
    Judge,
    fit_scales,
    fit_ways,
    without_experts,
)
from liar_ext.selection.whole_experts import KeptExperts, layers_of


def fitted(model: nn.Module, kept: Tensor, batches: list[dict]) -> list[Chosen]:
    """Return all layers with the same experts kept, and their scales by each way."""
    found = collected(model, batches)
    ways = [fit_ways(tokens, kept, "linear", "auto") for tokens in found]
    return [Chosen(t.site, kept, each, 0.0) for t, each in zip(found, ways, strict=True)]


@torch.no_grad()
def decide(model: nn.Module, batches: list[dict], layers: list[Chosen]) -> tuple[str, dict]:
    """Return what the whole model decides once its sequences have passed all blocks."""
    walk = Walk(InMemory(model))
    judge = Judge(walk, list(read_batches(batches)))
    by_block = {walk.blocks.index_of(layer.site): layer for layer in layers}
    with walk.begun():
        for index in range(len(walk.blocks)):
            judge.advance(index, by_block.get(index))
    return judge.decide()


def sliced(name: str, kept: tuple[int, ...], scales: list[Tensor]) -> nn.Module:
    """Return a model without the other experts."""
    model = eager(name)
    teams = [site.team for site in layers_of(model)]
    plan = Plan(name, "auto", {}, experts={team: SitePlan(5, kept) for team in teams})
    apply_plan(model, plan, {team: (s, None) for team, s in zip(teams, scales, strict=True)})
    return model


@pytest.mark.parametrize("name", MOE)
def test_scales_are_least_squares(name: str) -> None:
    model, kept = eager(name), (0, 2, 3)
    tokens = collected(model, text(model))[0]
    scales = fit_scales(tokens.energy, tokens.sums(torch.tensor(kept)), 1e-13)
    wanted = layer_outputs(model, text(model)).flatten()
    columns = alone(name, kept)
    solved = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(scales.both, solved, rtol=1e-6, atol=1e-8)
    left = (columns @ solved - wanted).square().sum() / wanted.square().sum()
    assert scales.facts["error"] == pytest.approx(float(left), rel=1e-6)
    dropped = (pruned_outputs(name, kept).flatten() - wanted).square().sum()
    assert left <= dropped / wanted.square().sum()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scales_are_divided_by_a_power_of_the_slope(power: float) -> None:
    """Unbiased, the error is uncorrelated with the output; with half of it, about as long."""
    model, kept = eager("mixtral"), (0, 2, 3)
    tokens = collected(model, text(model))[0]
    given = tokens.energy, tokens.sums(torch.tensor(kept)), 1e-13
    least, found = (fit_scales(*given, each) for each in (0.0, power))
    y = layer_outputs(model, text(model)).flatten()
    columns = alone("mixtral", kept)
    slope = float(columns @ least.both @ y / y.square().sum())
    assert 0 < slope < 1
    torch.testing.assert_close(found.both, least.both / slope**power)
    mine = columns @ found.both
    assert float(mine @ y / y.square().sum()) == pytest.approx(slope ** (1 - power))
    if power == 1.0:
        assert abs(float((mine - y) @ y)) <= 1e-8 * float(y.square().sum())
    if power == 0.5:  # least squares without ridge: Σ y'² = Σ y' y
        assert float(mine.square().sum()) == pytest.approx(float(y.square().sum()), rel=1e-6)
    left = (mine - y).square().sum() / y.square().sum()
    assert found.facts["error"] == pytest.approx(float(left), rel=1e-6)


def test_each_fold_has_scales_of_its_own() -> None:
    model, kept = eager("mixtral"), torch.tensor([0, 2, 3])
    batches = text(model)
    tokens = collected(model, batches)[0]
    a, c = tokens.sums(kept)
    found = fit_scales(tokens.energy, (a, c), 0.1)
    unseen = 0.0
    for fold in range(2):
        shift = 0.1 * a[fold].diagonal().mean() * torch.eye(3).double()
        one = torch.ones(3).double()
        solved = one + torch.linalg.solve(a[fold] + shift, c[fold] - a[fold] @ one)
        torch.testing.assert_close(found.by_fold[fold], solved)
        other = 1 - fold
        unseen += float(tokens.energy[other] + solved @ a[other] @ solved - 2 * solved @ c[other])
    assert found.facts["holdout_error"] == pytest.approx(unseen / float(tokens.energy.sum()))


@pytest.mark.parametrize("name", [*MOE, "qwen2_moe", "deepseek_v3", "lfm2_moe"])
@torch.no_grad()
def test_a_model_is_run_as_if_experts_had_left(name: str) -> None:
    if name in MOE:
        model, kept, count = eager(name), torch.tensor([0, 2, 3]), 5
    else:
        model, kept, count = tiny(name, dtype=torch.float64), torch.tensor([0, 2, 3]), 4
        model.set_experts_implementation("eager")
    inputs = tiny_inputs(model)
    scales = [torch.rand(3, dtype=torch.float64) + 0.5 for _ in layers_of(model)]
    layers = []
    for site, each in zip(layers_of(model), scales, strict=True):
        layers.append((Chosen(site, kept, {}, 0.0), each))
    before = outputs(model, inputs)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(without_experts(model, *layer))
        found = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), before)
    plan = {layer.site.team: SitePlan(count, (0, 2, 3)) for layer, _ in layers}
    weights = {layer.site.team: (each, None) for layer, each in layers}
    apply_plan(model, Plan(model.config.model_type, "auto", {}, experts=plan), weights)
    # Routers give weights in float32, which scales are multiplied into here, and not into W.
    torch.testing.assert_close(found, outputs(model, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before)


def test_the_way_of_the_least_divergence_of_sliced_models_is_taken() -> None:
    """On each fold with the scales of the other."""
    model, kept = eager("mixtral"), (0, 2, 3)
    batches = text(model)
    layers = fitted(model, torch.tensor(kept), batches)
    way, found = decide(model, batches, layers)
    assert list(found) == [PLAIN, *POWERS] and way == min(found, key=found.get)
    for name, value in found.items():
        expected, rows = 0.0, 0
        for fold in range(2):
            read = read_batches(batches)
            mine = [each.select((each.fold == fold).nonzero().flatten()) for each in read]
            scales = [layer.ways[name].by_fold[1 - fold] for layer in layers]
            judged = Divergence(model, mine).of(sliced("mixtral", kept, scales))
            expected += judged["divergence"] * judged["rows"]
            rows += judged["rows"]
        assert value == pytest.approx(expected / rows, rel=1e-5), name


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe", "lfm2_moe"])
def test_models_are_judged_past_all_blocks(name: str) -> None:
    """Of some the first layers have no experts, or the layers between."""
    model, total, rows = tiny(name), 0.0, 0
    batches = text(model)
    chosen = chosen_of(model, batches, 0.75)
    fewer = copy.deepcopy(model)
    apply_plan(fewer, Plan(model.config.model_type, "auto", {}, experts=chosen.plans))
    for fold in range(2):
        mine = [
            each.select((each.fold == fold).nonzero().flatten()) for each in read_batches(batches)
        ]
        judged = Divergence(model, mine).of(fewer)
        total, rows = total + judged["divergence"] * judged["rows"], rows + judged["rows"]
    assert chosen.divergences[PLAIN] == pytest.approx(total / rows, rel=1e-3)


def same_experts(**fields) -> nn.Module:
    """Return a mixture whose four experts all compute the same, and get the same weight."""
    settings = {"num_key_value_heads": 8, "norm_topk_prob": False, "num_hidden_layers": 1}
    model = tiny("olmoe", dtype=torch.float64, **settings, **fields)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        model.model.layers[0].mlp.gate.weight.zero_()
    return model


def without(model: nn.Module, chosen: KeptExperts) -> nn.Module:
    """Return a copy of a model without the experts that leave."""
    fewer = copy.deepcopy(model)
    plan = Plan(model.config.model_type, "auto", {}, experts=chosen.plans)
    apply_plan(fewer, plan, chosen.scales)
    return fewer


def test_scales_that_restore_the_output_are_taken() -> None:
    """A softmax over half of the experts gives each twice the weight."""
    model = same_experts()
    chosen = chosen_of(model, text(model), 0.5)
    assert chosen.rows[0].path in POWERS
    (scales, _) = chosen.scales["0.mlp"]
    torch.testing.assert_close(scales.mean(), torch.tensor(0.5, dtype=torch.float64))
    fewer = without(model, chosen)
    inputs = tiny_inputs(model)
    torch.testing.assert_close(outputs(fewer, inputs), outputs(model, inputs))
    plain = chosen_of(model, text(model), 0.5, mode="none")
    assert plain.rows[0].path == PLAIN and not plain.divergences
    assert not torch.allclose(outputs(without(model, plain), inputs), outputs(model, inputs))


def test_scales_that_only_serve_what_the_head_ignores_are_not_taken() -> None:
    """Experts agree where the head reads, and the error lies in features that it doesn't read."""
    model = tiny("mixtral", dtype=torch.float64, num_hidden_layers=1)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        experts, read = model.model.layers[0].mlp.experts, slice(0, 8)
        experts.gate_up_proj.copy_(experts.gate_up_proj[:1].expand(4, -1, -1).clone())
        experts.down_proj[:, read] = experts.down_proj[:1, read].clone()
        experts.down_proj[:, 8:] *= 5
        model.lm_head.weight[:, 8:] = 0
    batches = [tiny_inputs(model, 8, 24, seed) for seed in range(4)]
    chosen = chosen_of(model, batches, 0.5)
    layers = fitted(model, torch.tensor(chosen.plans["0.mlp"].kept), batches)
    plain, scaled = (layers[0].ways[name].facts for name in (PLAIN, "scaled"))
    assert scaled["error"] < 0.95 * plain["error"]  # by the layer's output they would be
    assert scaled["holdout_error"] < 0.95 * plain["holdout_error"]
    found, way = chosen.divergences, chosen.rows[0].path
    assert found["scaled"] > 1.2 * found[PLAIN] and found[way] == min(found.values())
    ways = {name: layers[0].ways[name] for name in (PLAIN, "scaled")}
    assert decide(model, batches, [replace(layers[0], ways=ways)])[0] == PLAIN


def test_a_way_whose_outputs_overflow_is_not_taken() -> None:
    model, kept = eager("mixtral"), torch.tensor([0, 2, 3])
    batches = text(model)
    layers = fitted(model, kept, batches)
    for index, layer in enumerate(layers):
        wrong = layer.ways["scaled"]
        wrong = replace(wrong, by_fold=tuple(each * math.nan for each in wrong.by_fold))
        ways = {PLAIN: layer.ways[PLAIN], "scaled": wrong}
        layers[index] = replace(layer, ways=ways)
    way, found = decide(model, batches, layers)
    assert way == PLAIN and not math.isfinite(found["scaled"])
