"""What the tokens of a sequence count, in sums and in solves of a walk."""

from __future__ import annotations

import pytest
import torch
from tiny import batches, eager, tiny

from liar_ext import calibrate, reconstruct_layerwise
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import sites


def model_of(name: str):
    return eager(name) if name == "mixtral" else tiny(name, dtype=torch.float64)


def weighted(name: str, weights: torch.Tensor | None) -> list[dict]:
    found = batches(tiny(name), 2)
    for batch in found:
        batch["attention_mask"][:, :3] = 0
        if weights is not None:
            batch["weight"] = weights
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_sums_are_linear_in_the_weights(name: str):
    """``G(w) + G(2 − w) = 2 G(1)``, also of experts, and where a norm reads the output."""
    model = model_of(name)
    some = 0.5 + torch.rand(8, generator=torch.Generator().manual_seed(0)).double()
    one, other, plain = (
        calibrate(model, weighted(name, weights)) for weights in (some, 2 - some, None)
    )
    for site in plain:
        total = one[site].gram + other[site].gram
        torch.testing.assert_close(total.tril(), 2 * plain[site].gram.tril(), rtol=1e-6, atol=1e-9)
        assert not torch.allclose(one[site].gram, plain[site].gram, rtol=1e-3)
    assert one.source["tokens"] == plain.source["tokens"] == 2 * 8 * 13


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_a_walk_solves_for_the_weights(name: str):
    """A weight of 2 is the sequence twice; a weight near 0 leaves it out."""
    model = model_of(name)
    kept = {s.name: SitePlan(s.units, tuple(range(s.units // 2))) for s in sites(model)}
    plan = Plan(name, "kv_group", kept)
    some = torch.tensor([2.0, 2.0, *[1e-12] * 6])
    heavy = weighted(name, some)
    few = [{n: value[:2] for n, value in each.items() if n != "weight"} for each in heavy]
    settings = {"damp": 1e-3, "mode": "linear"}
    found, expected, equal = (
        reconstruct_layerwise(model, each, plan, **settings)[0]
        for each in (heavy, few, weighted(name, None))
    )
    for site, (weight, _) in expected.items():
        torch.testing.assert_close(found[site][0], weight, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(found[s][0], equal[s][0], rtol=1e-3) for s in equal)
