"""Scales of what layers give: derivatives by brute force, steps in closed form, weights by runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from covers import cover
from tiny import batches, tiny, tiny_inputs

from liar_ext import prune, sites
from liar_ext.calibration.batches import probe_batches
from liar_ext.calibration.divergence import DenseOutputs, Divergence
from liar_ext.job.solving import (
    LADDER,
    NUDGE,
    Expansion,
    Handle,
    _expansion,
    _multiply,
    _scaled,
    best_step,
    handles_of,
    rescale,
    rescale_batches,
)
from liar_ext.selection.sensitivity import POSITIONS, blocks_before

# Norms of branches and offsets, biases, transposed weights, norms after sums, no logits.
FAMILIES = ("llama", "gemma3_text", "opt", "gpt2", "bert", "distilbert", "olmo2")


def changed(model: torch.nn.Module, by: float = 0.05) -> torch.nn.Module:
    """Return a model with other weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn_like(parameter) * parameter.std(correction=0)
    return other


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return blocks_before(model, sites(model))[0]


@torch.no_grad()
def measured(outputs: DenseOutputs, model: torch.nn.Module, factors: dict[Handle, float]) -> float:
    with _scaled(model, factors):
        return outputs.divergence(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_those_of_the_divergence(family):
    dense = tiny(family, dtype=torch.float64)
    pruned = changed(dense)
    data = tiny_inputs(dense, batch=3, tokens=12)
    handles = handles_of(pruned, sites(pruned))
    with torch.no_grad():
        outputs = DenseOutputs(dense, data)
        found = _expansion(outputs, pruned, handles, blocks_of(pruned))
    assert found.rows == len(outputs)
    assert found.divergence == pytest.approx(measured(outputs, pruned, {}), rel=1e-6)
    # Of a step forward, in which half of the curvature is.
    off = 0.03 * found.slope.abs().max() + NUDGE * found.curvature.diagonal()
    for handle, slope, each in zip(handles, found.slope.tolist(), off.tolist(), strict=True):
        up, down = (measured(outputs, pruned, {handle: 1 + by}) for by in (1e-2, -1e-2))
        assert slope == pytest.approx((up - down) / 2e-2, rel=0.1, abs=each)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "distilbert"])
def test_curvatures_are_those_about_the_dense_model(family):
    """There the slope is zero, and what the expansion leaves out is, too."""
    dense = tiny(family, dtype=torch.float64)
    handles = handles_of(dense, sites(dense))
    with torch.no_grad():
        outputs = DenseOutputs(dense, tiny_inputs(dense, batch=3, tokens=12))
        found = _expansion(outputs, dense, handles, blocks_of(dense))
    assert found.slope.abs().max() < 1e-3 * found.curvature.diagonal().max()
    torch.manual_seed(0)
    for _ in range(4):
        step = 0.02 * torch.randn(len(handles), dtype=torch.float64)
        factors = dict(zip(handles, (1 + step).tolist(), strict=True))
        assert measured(outputs, dense, factors) == pytest.approx(found.change(step), rel=0.15)


def test_rounding_adds_nothing_to_slopes():
    """A difference to the outputs as they are, which the slope is multiplied with, would."""
    dense = tiny("llama")
    with torch.no_grad():
        dense.model.norm.weight *= 30  # logits that rounding shows in
    pruned = changed(dense)
    data = tiny_inputs(dense, batch=16, tokens=24)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        models = dense.to(dtype), pruned.to(dtype)
        handles = handles_of(pruned, sites(pruned))
        with torch.no_grad():
            outputs = DenseOutputs(models[0], data)
            found[dtype] = _expansion(outputs, models[1], handles, blocks_of(pruned)).slope
    exact, rounded = found.values()
    assert (rounded - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_give_what_was_scaled(family):
    model = tiny(family, dtype=torch.float64)
    data = tiny_inputs(model, batch=2, tokens=8)
    handles = handles_of(model, sites(model))
    factors = {handle: 0.7 + 0.1 * index for index, handle in enumerate(handles)}
    with torch.no_grad():
        outputs = DenseOutputs(model, data)
        with _scaled(model, factors):
            wanted = outputs.outputs(model)
        before = outputs.outputs(model)
        for handle, factor in factors.items():
            _multiply(model.get_submodule(handle.path), factor, handle.offset)
        given = outputs.outputs(model)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)  # Gemma's norms are in float32
    assert not torch.allclose(before, wanted)


def test_what_can_be_scaled():
    llama, gemma, moe = tiny("llama"), tiny("gemma3_text"), tiny("qwen3_moe")
    named = {handle.name: handle for handle in handles_of(llama, sites(llama))}
    assert named.keys() == {site.name for site in sites(llama)} | {"head"}
    assert named["head"] == Handle("head", "model.norm", 3)
    mlp = sites(llama)[3].name
    assert named[mlp] == Handle(mlp, "model.layers.1.mlp.down_proj", 1)
    named = {handle.name: handle for handle in handles_of(gemma, sites(gemma))}
    after = "model.layers.2.post_attention_layernorm"
    attn = sites(gemma)[4].name
    assert named[attn] == Handle(attn, after, 2, 1.0)
    assert named["head"] == Handle("head", "model.norm", 3, 1.0)
    assert not any("experts" in handle.path for handle in handles_of(moe, sites(moe)))


def expansion(slope: list[float], curvature: list[list[float]], rows: int = 4) -> Expansion:
    wide = (torch.tensor(each, dtype=torch.float64) for each in (slope, curvature))
    return Expansion(rows, 1.0, *wide)


def test_alike_batches_take_the_whole_step():
    same = [expansion([2.0, -1.0], [[4.0, 1.0], [1.0, 2.0]])] * 3
    damp, change, step = best_step(same)
    assert damp == LADDER[0]
    exact = -torch.linalg.solve(same[0].curvature, same[0].slope)
    torch.testing.assert_close(step, exact, rtol=0.05, atol=0.01)
    assert change == pytest.approx(same[0].change(step) / 4, rel=1e-3)


def test_the_damp_is_that_of_least_held_out_divergence():
    torch.manual_seed(1)
    found = []
    for _ in range(4):
        root = torch.randn(6, 12, dtype=torch.float64)
        slope = torch.ones(6, dtype=torch.float64) + torch.randn(6, dtype=torch.float64)
        found.append(Expansion(3, 1.0, slope, root @ root.T))
    damp, change, step = best_step(found)
    changes = {}
    for each in LADDER:
        total = 0.0
        for out in range(4):
            rest = [found[i] for i in range(4) if i != out]
            slope, curvature = (sum(getattr(e, n) for e in rest) for n in ("slope", "curvature"))
            size = each * curvature.diagonal().mean() * torch.eye(6, dtype=torch.float64)
            total += found[out].change(-torch.linalg.solve(curvature + size, slope))
        changes[each] = total / 12
    assert damp == min(changes, key=changes.get) != LADDER[0]
    assert change == pytest.approx(changes[damp]) and step is not None


@pytest.mark.parametrize(
    "found",
    [
        [expansion([1.0], [[1.0]])],
        [expansion([1.0], [[1.0]]), expansion([-1.0], [[1.0]])],
        [expansion([1.0], [[1.0]]), expansion([1.0], [[1.0]], rows=0)],
        [expansion([1.0], [[1.0]]), expansion([1.0], [[math.nan]])],
        [expansion([0.0], [[0.0]])] * 2,
    ],
    ids=["one batch", "opposite", "no rows", "not finite", "nothing moves"],
)
def test_no_step_where_none_is_known_to_be_better(found):
    damp, change, step = best_step(found)
    assert (damp, change, step) == (math.inf, 0.0, None)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "distilbert"])
def test_a_scale_that_was_taken_is_given_back(family):
    dense = tiny(family)
    pruned = copy.deepcopy(dense)
    data = [tiny_inputs(dense, batch=2, tokens=16, seed=seed) for seed in range(4)]
    handle = handles_of(pruned, sites(pruned))[1]
    with torch.no_grad():
        _multiply(pruned.get_submodule(handle.path), 0.9, handle.offset)
    found = rescale(Divergence(dense, data, POSITIONS), pruned)
    assert found.after < 0.1 * found.before and found.held_out < 0
    assert found.scales[handle.name] == pytest.approx(1 / 0.9, abs=0.02)
    assert rescale(Divergence(dense, data, POSITIONS), pruned).before == pytest.approx(
        found.after, rel=1e-3
    )


def test_the_dense_model_stays_as_it_is():
    dense = tiny("llama")
    same = copy.deepcopy(dense)
    data = [tiny_inputs(dense, batch=2, tokens=16, seed=seed) for seed in range(4)]
    found = rescale(Divergence(dense, data, POSITIONS), same)
    assert found.scales == {} and found.before == found.after == pytest.approx(0, abs=1e-6)
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name])


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_outputs_that_are_not_finite_scale_nothing(which):
    models = {"dense": tiny("llama"), "pruned": tiny("llama")}
    data = [tiny_inputs(models["dense"], batch=2, seed=seed) for seed in range(3)]
    with torch.no_grad():
        models[which].model.norm.weight.fill_(torch.inf)
    found = rescale(Divergence(models["dense"], data, POSITIONS), models["pruned"])
    assert found.scales == {} and found.before is found.after is None
    assert found.facts()["divergence_unscaled"] is None


@cover(1, schedule=["one-pass", "layerwise"], family=["llama", "gemma3_text", "bert", "qwen3_moe"])
def test_a_job_reports_what_scales_gave(family, schedule):
    dense = tiny(family)
    plain, scaled = copy.deepcopy(dense), copy.deepcopy(dense)
    data = batches(dense)
    choices = {"keep": 0.5, "schedule": schedule, "allocation": "uniform"}
    prune(plain, data, **choices)
    report = prune(scaled, data, **choices, rescale=True)
    said = report.settings
    assert said["divergence_rescaled"] <= said["divergence_unscaled"]
    assert "rescale" in report.seconds and report.recipe.rescale
    some = any("Nothing was rescaled" in each for each in report.warnings)
    assert some == (said["greatest_scale"] == said["least_scale"] == 1.0)
    # By a run of its own, on the sequences that were compared.
    probes = rescale_batches(data)
    with torch.no_grad():
        each = [DenseOutputs(dense, batch) for batch in probes]
        rows = sum(map(len, each))
        for model, name in ((plain, "divergence_unscaled"), (scaled, "divergence_rescaled")):
            mean = sum(outputs.divergence(model) for outputs in each) / rows
            assert said[name] == pytest.approx(mean, rel=1e-3, abs=1e-7)


def test_text_of_no_source_counts_too():
    dense = tiny("llama")
    data = tiny_inputs(dense, batch=8, tokens=8) | {"source": torch.tensor([0] * 6 + [-1] * 2)}
    taken = [len(batch["input_ids"]) for batch in rescale_batches([data])]
    assert taken == [2, 2, 2, 2]
    assert sum(len(batch["input_ids"]) for batch in probe_batches([data])) == 6
