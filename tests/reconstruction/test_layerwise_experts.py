"""Layerwise over mixtures of experts: what each expert is asked for, on the tokens it gets then."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from folders import plan_of_experts
from tiny import MOE, eager, given, outputs, routes, seen_at, tiny, tiny_inputs
from torch import Tensor, nn

from liar_ext import apply_plan, prune, reconstruct_layerwise, sites
from liar_ext.models.sites import get_consumer_weight, teams_of
from liar_ext.models.whole import called_at, gated
from liar_ext.reconstruction.walk import LayerwiseSolver


def padded(model: nn.Module) -> list[dict]:
    data = [tiny_inputs(model, batch=6, tokens=16, seed=seed) for seed in range(3)]
    for inputs in data:
        inputs["attention_mask"][2, 7:] = 0
    return data


@pytest.mark.parametrize("target", ["branch", "stream"])
@pytest.mark.parametrize("name", [*MOE, "llama4_text"])
@torch.no_grad()
def test_experts_share_what_their_layer_falls_short_by(name: str, target: str, monkeypatch) -> None:
    """Least squares by hand, of the tokens of each expert in the model pruned up to its layer."""
    model, damp = eager(name), 1e-3
    data, plan = padded(model), plan_of_experts(model)
    if target == "branch":
        monkeypatch.setattr(LayerwiseSolver, "_target_at", lambda self, site: target)
    weights, rows = reconstruct_layerwise(model, data, plan, mode="linear", damp=damp)
    shares = {row.name: row.share for row in rows}
    at = [site for site in sites(model) if site.expert is not None]
    layer = list(teams_of(at).values())[-1]
    block, experts, order = layer[0].path, called_at(layer[0]), list(plan.sites)
    done = {each: plan.sites[each] for each in order[: order.index(layer[0].name)]}
    half = copy.deepcopy(model)
    apply_plan(half, replace(plan, sites=done), {each: weights[each] for each in done})
    half.set_experts_implementation("eager")

    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {site.expert: [] for site in layer}
    for inputs in data:
        ends = [seen_at(each, [block, experts], inputs) for each in (model, half)]
        if target == "branch":
            dense, ours = (given(model, each[experts][1]) for each in ends)
        else:
            dense, ours = (each[block][1] for each in ends)
        short = (dense - ours).reshape(-1, layer[0].d_out)
        read, chosen, weight = routes(model, ends[1][experts][0])
        for token in inputs["attention_mask"].flatten().nonzero().flatten().tolist():
            for place, expert in enumerate(chosen[token].tolist()):
                x = gated(half, layer[expert], read[token, expert][None])[0]
                found[expert].append((x, short[token] / weight[token].sum(), weight[token, place]))
    shifted = 0
    for site in layer:
        x, r, weight = (torch.stack(each) for each in zip(*found[site.expert], strict=True))
        kept, dense = list(plan.sites[site.name].kept), get_consumer_weight(model, site)
        wanted, scale = x @ dense.T + shares[site.name] * r, weight[:, None]
        root = (damp * (scale * x[:, kept]).square().sum(0).mean()).sqrt()
        root = root * torch.eye(len(kept), dtype=x.dtype)
        left = torch.cat([scale * x[:, kept], root])
        right = torch.cat([scale * wanted, root @ dense[:, kept].T])
        solution = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(weights[site.name][0], solution, rtol=1e-6, atol=1e-8)
        assert next(row.tokens for row in rows if row.name == site.name) == len(x)
        shifted += shares[site.name] * float(r.abs().sum())
    assert shifted > 0


@pytest.mark.parametrize(("name", "plain"), [("deepseek_v3", True), ("qwen2_moe", False)])
@torch.no_grad()
def test_an_expert_of_every_token_makes_up_for_what_the_layer_falls_short_by(
    name: str, plain: bool
) -> None:
    """Least squares by hand; where a gate scales what it gives, its own dense output is asked."""
    model, damp = eager(name), 1e-3
    data, plan = padded(model), plan_of_experts(model)
    weights, rows = reconstruct_layerwise(model, data, plan, mode="linear", damp=damp)
    site = [site for site in sites(model) if site.name.endswith("shared_mlp")][-1]
    row = next(row for row in rows if row.name == site.name)
    done = {each: plan.sites[each] for each in list(plan.sites) if each != site.name}
    order = [each.name for each in sites(model)]
    done = {each: kept for each, kept in done.items() if order.index(each) < order.index(site.name)}
    half = copy.deepcopy(model)
    apply_plan(half, replace(plan, sites=done), {each: weights[each] for each in done})
    half.set_experts_implementation("eager")
    xs, wanted, dense = [], [], get_consumer_weight(model, site)
    for inputs in data:
        ends = [seen_at(each, [site.path, site.consumer], inputs) for each in (model, half)]
        where = site.path if plain else site.consumer
        (x,), own = ends[1][site.consumer]
        short = (ends[0][where][1] - ends[1][where][1]).reshape(-1, site.d_out)
        used = inputs["attention_mask"].flatten().bool()
        xs.append(x.reshape(-1, site.d_in)[used])
        wanted.append((own.reshape(-1, site.d_out) + row.share * short)[used])
    x, y, kept = torch.cat(xs), torch.cat(wanted), list(plan.sites[site.name].kept)
    root = (damp * x[:, kept].square().sum(0).mean()).sqrt()
    ridge = root * torch.eye(len(kept), dtype=x.dtype)
    a, b = torch.cat([x[:, kept], ridge]), torch.cat([y, ridge @ dense[:, kept].T])
    torch.testing.assert_close(weights[site.name][0], torch.linalg.lstsq(a, b).solution.T)
    assert ("branch, as the stream is not a plain sum here" in row.path) != plain


@pytest.mark.parametrize("name", [*MOE, "llama4_text"])
@torch.no_grad()
def test_removing_nothing_changes_nothing(name: str) -> None:
    model = eager(name)
    plan, before = plan_of_experts(model), outputs(model)
    kept = {name: replace(s, kept=tuple(range(s.units))) for name, s in plan.sites.items()}
    plan = replace(plan, sites=kept)
    weights, rows = reconstruct_layerwise(model, padded(model), plan)
    assert torch.equal(outputs(model), before)
    for site in sites(model):
        assert torch.equal(weights[site.name][0], get_consumer_weight(model, site))
        assert weights[site.name][1] is None  # the bias stays
    assert all(row.error == 0 for row in rows)


@pytest.mark.parametrize("name", [*MOE, "ernie4_5_moe", "llama4_text", "qwen2_moe"])
def test_a_walk_comes_nearer_to_the_dense_model_than_one_pass(name: str) -> None:
    model = tiny(name)
    data = [tiny_inputs(model, batch=16, tokens=16, seed=seed) for seed in range(4)]
    fresh = [tiny_inputs(model, batch=16, tokens=16, seed=seed) for seed in range(10, 12)]
    dense, left = [outputs(model, each) for each in fresh], {}
    for schedule in ("layerwise", "one-pass"):
        pruned = copy.deepcopy(model)
        kinds = ("mlp",) if name == "olmoe" else ("attn", "mlp")
        choices = {"criterion": "wifv", "allocation": "uniform", "kinds": kinds}
        report = prune(pruned, data, 0.6, schedule=schedule, certify_on=fresh[:1], **choices)
        assert report.settings["schedule"] == schedule
        assert all(row.certified_error is not None for row in report.sites)
        pairs = zip(fresh, dense, strict=True)
        left[schedule] = float(sum((outputs(pruned, d) - y).square().sum() for d, y in pairs))
    assert left["layerwise"] < left["one-pass"]
