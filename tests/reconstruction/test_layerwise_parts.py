"""Layerwise over models of several stacks: two towers, and a decoder that reads an encoder."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from covers import some
from folders import make_plan
from tiny import outputs, seen_at, tiny, tiny_inputs
from torch import Tensor, nn

from liar_ext import InputError, apply_plan, prune, reconstruct_layerwise, sites
from liar_ext.reconstruction.streams import InMemory, Walk
from liar_ext.reconstruction.walk import LayerwiseSolver

# T5 passes a bias of positions on; MBart and Pegasus normalise first, BART after the sum.
PARTS = ["clip", "bart", "mbart", "t5", "whisper"]


def padded(model: nn.Module, count: int = 4) -> list[dict]:
    """Return batches of both folds, with padding of its own in each part that can have some."""
    data = [tiny_inputs(model, batch=6, tokens=12, seed=seed) for seed in range(count)]
    for inputs in data:
        if "attention_mask" in inputs:
            inputs["attention_mask"][2, 5:] = 0
        if "decoder_input_ids" in inputs:
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
            inputs["decoder_attention_mask"][1, -3:] = 0
    return data


def whole_plan(model: nn.Module):
    """Return a plan that removes nothing."""
    plan = make_plan(model)
    kept = {name: replace(s, kept=tuple(range(s.units))) for name, s in plan.sites.items()}
    return replace(plan, sites=kept)


def hidden_at(model: nn.Module, path: str, inputs: dict) -> tuple[Tensor, Tensor]:
    """Return the hidden states that a module reads and gives in the model's own forward."""
    args, output = seen_at(model, [path], inputs)[path]
    return args[0], output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_the_streams_of_every_stack_are_those_of_both_models(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    plan, pruned = make_plan(model), copy.deepcopy(model)
    blocks = (given := Walk(InMemory(model))).blocks
    with blocks.opened():
        walk = LayerwiseSolver(given, plan, "auto", "auto")
        walk.start(padded(model))
        ends = {}
        for index in range(len(blocks)):
            walk.step(index)
            if index + 1 == len(blocks) or blocks.begins(index + 1):
                ends[next(iter(blocks.layers[index].values()))[0].path] = [
                    (part.batch.inputs, part.states["dense"].get(), part.states["pruned"].get())
                    for part in walk.parts
                ]
    apply_plan(pruned, plan, walk.weights)
    assert len(ends) == 2
    for path, parts in ends.items():
        for inputs, before, after in parts:
            torch.testing.assert_close(after, hidden_at(pruned, path, inputs)[1])
            torch.testing.assert_close(before, hidden_at(model, path, inputs)[1])
            assert not torch.allclose(before, after)
    read = sites(model)[-1].part.cross_attn is not None
    assert all((len(part.states) > 2) == read for part in walk.parts)


@pytest.mark.parametrize("name", [*PARTS, "bart decoder", "t5 encoder"])
def test_removing_nothing_changes_nothing(name: str) -> None:
    model = tiny(name)
    data, before = padded(model), outputs(model)
    weights, rows = reconstruct_layerwise(model, data, whole_plan(model))
    assert torch.equal(outputs(model), before)  # nothing was changed on the way
    apply_plan(model, whole_plan(model), weights)
    assert torch.equal(outputs(model), before)
    assert all(row.error == 0 for row in rows) and len(rows) == len(sites(model))


@pytest.mark.parametrize("name", ["decoder.0.cross_attn", "decoder.1.cross_attn", "decoder.1.mlp"])
@torch.no_grad()
def test_a_site_of_a_decoder_is_the_least_squares_solution(name: str, monkeypatch) -> None:
    """Of what it reads beside the pruned encoder, for what it gives beside the dense one."""
    monkeypatch.setattr(LayerwiseSolver, "_target_at", lambda self, site: "branch")
    model, damp = tiny("bart", dtype=torch.float64), 1e-3
    data, plan = padded(model), make_plan(model)
    weights, rows = reconstruct_layerwise(model, data, plan, mode="linear", damp=damp)
    share = next(row.share for row in rows if row.name == name)
    site = next(each for each in sites(model) if each.name == name)
    order = [each.name for each in sites(model)]
    done = {each: plan.sites[each] for each in order[: order.index(name)]}
    half = copy.deepcopy(model)
    apply_plan(half, replace(plan, sites=done), {each: weights[each] for each in done})

    read, wanted = [], []
    for inputs in data:
        real = inputs["decoder_attention_mask"].bool()
        read.append(hidden_at(half, site.consumer, inputs)[0][real])
        wanted.append(hidden_at(model, site.consumer, inputs)[1][real])
    consumer = model.get_submodule(site.consumer)
    kept = site.features(plan.sites[name].kept)
    own = torch.cat(read) @ consumer.weight.T
    x, y = torch.cat(read)[:, kept], own + share * (torch.cat(wanted) - consumer.bias - own)
    root = (damp * x.square().sum(0).mean()).sqrt() * torch.eye(len(kept), dtype=x.dtype)
    old = consumer.weight[:, kept]
    solution = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([y, root @ old.T])).solution.T
    torch.testing.assert_close(weights[name][0], solution, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(solution, old, atol=1e-2)


@some("name", PARTS, "clip", "t5")
def test_a_walk_comes_nearer_to_the_dense_model_than_one_pass(name: str) -> None:
    model = tiny(name)
    data, dense = padded(model), {}
    for inputs in data:
        dense[id(inputs)] = outputs(model, inputs)
    left = {}
    for schedule in ("layerwise", "one-pass"):
        pruned = copy.deepcopy(model)
        report = prune(pruned, data, 0.7, schedule=schedule, criterion="wifv", allocation="uniform")
        assert report.settings["schedule"] == schedule
        errors = [(outputs(pruned, each) - dense[id(each)]).square().sum() for each in data]
        left[schedule] = float(sum(errors))
    assert left["layerwise"] < left["one-pass"]


def test_what_a_decoder_reads_is_made_where_a_batch_lacks_it() -> None:
    model = tiny("t5")
    data = [{"input_ids": each["input_ids"]} for each in padded(model)]
    report = prune(model, data, 0.6)
    assert report.settings["schedule"] == "layerwise"


def test_max_memory_is_for_one_stack() -> None:
    from liar_ext.job.streamed import check_blocks
    from liar_ext.models.recipe import Recipe

    with pytest.raises(InputError, match="several stacks of blocks"):
        check_blocks(tiny("bart"), Recipe(keep=0.6), 0, certifies=False)
