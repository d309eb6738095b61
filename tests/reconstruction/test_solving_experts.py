"""What an expert's consumer is solved to: least squares on the tokens that reach it."""

from __future__ import annotations

import pytest
import torch
from tiny import MOE, eager, experts_of, tiny, tiny_inputs
from torch import Tensor, nn

from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.taps import watched
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight
from liar_ext.models.whole import routed_input
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.reconstruction.solve import reconstruct, what_to_know, with_bias
from liar_ext.selection.criteria import score
from liar_ext.selection.error_curves import error_curves


def planned(model: nn.Module) -> Plan:
    """Return a plan that keeps other channels of every expert."""
    kept = {
        site.name: SitePlan(site.units, tuple(range(site.expert, site.units, 4)))
        for site in experts_of(model)
    }
    return Plan(model.config.model_type, "auto", kept)


def routed(model: nn.Module, batches: list[dict], site: Site) -> tuple[Tensor, Tensor]:
    """Return what an expert reads of all tokens that reach it, and its weights of them."""
    found: list = []
    module = model.get_submodule(site.consumer.rpartition(".")[0])
    with watched(module, lambda args, _: found.append(routed_input(model, site, args))):
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    return torch.cat([each.x for each in found]), torch.cat([each.weight for each in found])


@pytest.mark.parametrize("name", MOE)
def test_an_expert_is_solved_by_least_squares_on_its_tokens(name: str) -> None:
    """The rows are the tokens times their weight, so that the error is that of the layer."""
    model = eager(name)
    batches = [tiny_inputs(model, 8, 16, seed) for seed in range(2)]
    plan = planned(model)
    weights, rows = reconstruct(model, calibrate(model, batches), plan, damp=1e-13)
    for site, row in zip(experts_of(model), rows, strict=True):
        x, r = routed(model, batches, site)
        kept = list(plan.sites[site.name].kept)
        weight, bias = get_consumer_weight(model, site), get_consumer_bias(model, site)
        r = r.double()[:, None]
        wanted, given = r * (x @ weight.T), r * x[:, kept]
        if bias is not None:
            wanted, given = wanted + r * bias, torch.cat([given, r], dim=1)
        solved = torch.linalg.lstsq(given, wanted).solution.T
        new, new_bias = weights[site.name]
        torch.testing.assert_close(new, solved[:, : len(kept)], rtol=1e-6, atol=1e-8)
        assert (new_bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(new_bias, solved[:, -1], rtol=1e-6, atol=1e-8)
        left = (given @ solved.T - wanted).square().sum()
        output = (r * (x @ weight.T)).square().sum()
        assert row.error == pytest.approx(float(left / output), rel=1e-6)
        assert row.tokens == len(x)


def test_experts_gain_no_bias() -> None:
    model = tiny("mixtral")
    batches = [tiny_inputs(model, 4, 16)]
    plan = with_bias(planned(model), model, "affine")
    assert not any(site.bias for site in plan.sites.values())
    bank = calibrate(model, batches)
    paths = {}
    for mode in ("affine", "linear", "bias", "none"):
        weights, rows = reconstruct(model, bank, plan, mode=mode, damp=1e-3)
        assert all(bias is None for _, bias in weights.values())
        paths[mode] = [row.path for row in rows]
    assert paths["affine"] == paths["linear"] and paths["bias"] == paths["none"]


def lopsided() -> nn.Module:
    """Return a model whose last expert no token reaches: its logit lies between ±v·h and ±2v·h."""
    model = tiny("mixtral", num_local_experts=5)
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.mlp.gate.weight
            rows.copy_(rows[0] * torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0])[:, None])
    return model


def test_an_expert_that_no_token_reaches_is_told_of() -> None:
    model = lopsided()
    batches = [tiny_inputs(model, 4, 16)]
    bank, at = calibrate(model, batches), experts_of(model)
    assert bank.source["routed"]["0.mlp.4"] == [0, 0]
    scores = score(model, bank, at, "wifv")
    for name in ("0.mlp.4", "1.mlp.4"):  # of which only the weights are known
        site = next(site for site in at if site.name == name)
        torch.testing.assert_close(
            scores[name], get_consumer_weight(model, site).double().square().sum(0)
        )
    curve = error_curves(model, bank, at, scores)["0.mlp.4"]
    assert (curve == 0).all()
    kept = tuple(range(0, 32, 2))
    plan = Plan("mixtral", "auto", {site.name: SitePlan(32, kept) for site in at})
    weights, rows = reconstruct(model, bank, plan)
    row = next(row for row in rows if row.name == "0.mlp.4")
    assert (row.tokens, row.path, row.error) == (0, "drop, a fold has no tokens", 0.0)
    dense = get_consumer_weight(model, at[4])[:, kept].double()
    torch.testing.assert_close(weights["0.mlp.4"][0], dense)
    (said,) = [each for each in what_to_know(rows, "auto", 10**6, 1) if "than the expert" in each]
    starved = [f"{row.name} ({row.tokens})" for row in rows if row.tokens < 32]
    assert "0.mlp.4 (0)" in starved and f"reached {', '.join(starved)}: their" in said
    assert what_to_know([row for row in rows if row.tokens >= 32], "none", 10**6, 1) == []


def test_an_expert_that_no_token_reaches_is_dropped_from_on_a_walk() -> None:
    model = lopsided()
    kept = tuple(range(0, 32, 2))
    plan = Plan("mixtral", "auto", {site.name: SitePlan(32, kept) for site in experts_of(model)})
    weights, rows = reconstruct_layerwise(model, [tiny_inputs(model, 4, 16)], plan)
    row = next(row for row in rows if row.name == "0.mlp.4")
    assert (row.tokens, row.path, row.error) == (0, "drop, a fold has no tokens", 0.0)
    dense = get_consumer_weight(model, experts_of(model)[4])[:, kept].double()
    torch.testing.assert_close(weights["0.mlp.4"][0], dense)
