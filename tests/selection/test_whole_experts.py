"""Which experts stay, and what their outputs are multiplied by, against the sliced layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import MOE, outputs, tiny, tiny_inputs
from tiny import eager as each_in_turn
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch, read_batches
from liar_ext.calibration.taps import watched
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.models.whole import reroute, router_of
from liar_ext.reconstruction.streams import InMemory, Walk
from liar_ext.selection.expert_scales import LayerTokens
from liar_ext.selection.whole_experts import (
    KeptExperts,
    choose,
    choose_experts,
    collect_tokens,
    layers_of,
)
from liar_ext.system.errors import InputError

EXPERTS = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}


def eager(name: str) -> nn.Module:
    return each_in_turn(name, **{EXPERTS.get(name, "num_experts"): 5})


def text(model: nn.Module) -> list[dict]:
    """Return batches with some padding."""
    found = [tiny_inputs(model, 4, 12, seed) for seed in range(2)]
    found[1]["attention_mask"][2, 5:] = 0
    return found


@torch.no_grad()
def layer_outputs(model: nn.Module, batches: list[dict]) -> Tensor:
    """Return what the first layer of experts gives for every token that counts."""
    found: list[Tensor] = []
    site = layers_of(model)[0]
    module = model.get_submodule(site.consumer.rpartition(".")[0])
    with watched(module, lambda _, output: found.append(output)):
        for batch in batches:
            model(**batch)
    masks = [batch["attention_mask"].flatten().bool() for batch in batches]
    return torch.cat([output[mask] for output, mask in zip(found, masks, strict=True)])


def chosen_of(model: nn.Module, batches: list[dict], keep: float, **how) -> KeptExperts:
    return choose_experts(Walk(InMemory(model)), batches, keep, **how)


@torch.no_grad()
def collected(model: nn.Module, batches: list[dict], stride: int = 1) -> list[LayerTokens]:
    """Return what all layers of experts do with a text."""

    def run(begin: Callable[[Batch], None]) -> None:
        for batch in read_batches(batches):
            begin(batch)
            model(**batch.inputs)

    return [collect_tokens(model, site, run, stride) for site in layers_of(model)]


def first_layer(name: str, kept: tuple[int, ...]) -> Plan:
    return Plan(name, "auto", {}, experts={"0.mlp": SitePlan(5, kept)})


def pruned_outputs(name: str, kept: tuple[int, ...], scales: Tensor | None = None) -> Tensor:
    model = eager(name)
    weights = {} if scales is None else {"0.mlp": (scales, None)}
    apply_plan(model, first_layer(name, kept), weights)
    return layer_outputs(model, text(model))


def alone(name: str, kept: tuple[int, ...]) -> Tensor:
    """Return the outputs of each expert in the pruned layer, by their column."""
    columns = []
    for place in range(len(kept)):
        only = torch.zeros(len(kept), dtype=torch.float64)
        only[place] = 1.0
        columns.append(pruned_outputs(name, kept, only).flatten())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("name", MOE)
def test_the_error_is_that_of_the_sliced_layer(name: str) -> None:
    """Tokens of removed experts go elsewhere, as the router's own code sends them."""
    model = eager(name)
    dense = layer_outputs(model, text(model))
    chosen = chosen_of(model, text(model), 0.6)
    row, plan = chosen.rows[0], chosen.plans["0.mlp"]
    assert (row.name, row.units_before, row.units_after) == ("0.experts", 5, 3)
    scales = chosen.scales["0.mlp"][0]
    left = (pruned_outputs(name, plan.kept, scales) - dense).square().sum()
    assert row.error == pytest.approx(float(left / dense.square().sum()), rel=1e-6)
    assert chosen.source["tokens"] == len(dense)


def test_the_first_expert_to_go_is_the_one_least_missed() -> None:
    model = eager("mixtral")
    tokens = collected(model, text(model))[0]
    wanted, errors = layer_outputs(model, text(model)).flatten(), []
    for gone in range(5):
        columns = alone("mixtral", tuple(each for each in range(5) if each != gone))
        solved = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
        errors.append(float((columns @ solved - wanted).square().sum()))
    (gone,) = set(range(5)) - set(choose(tokens, 4).tolist())
    assert errors[gone] == pytest.approx(min(errors), rel=0.02)  # chosen with a little ridge


@pytest.mark.parametrize("name", MOE)
def test_a_router_with_fewer_rows_is_foreseen(name: str) -> None:
    model = tiny(name)
    site, kept = layers_of(model)[0], torch.tensor([0, 1, 3])
    hidden = torch.randn(7, site.d_out)
    router = router_of(model, site)
    experts = layers_of(model)[0].wiring.experts
    weights, places = reroute(router, router(hidden)[0], kept, experts)
    apply_plan(model, Plan(name, "auto", {}, experts={"0.mlp": SitePlan(4, (0, 1, 3))}))
    _, expected, expected_places = router(hidden)
    assert torch.equal(places, expected_places)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("name", MOE)
def test_experts_and_channels_leave_together(name: str) -> None:
    """Channels are numbered by the experts that stay."""
    model, stepwise = tiny(name), tiny(name)
    experts = {site.team: SitePlan(4, (1, 2, 3)) for site in layers_of(model)}
    channels = {
        f"{layer}.{expert}": SitePlan(32, tuple(range(expert, 32, 4)))
        for layer in experts
        for expert in range(3)
    }
    apply_plan(model, Plan(name, "auto", channels, experts=experts))
    apply_plan(stepwise, Plan(name, "auto", {}, experts=experts))
    apply_plan(stepwise, Plan(name, "auto", channels))
    torch.testing.assert_close(outputs(model), outputs(stepwise))
    assert {site.experts for site in sites(model, ("mlp",)) if site.expert is not None} == {3}
    kept = next(site for site in sites(model, ("mlp",)) if site.expert == 1)
    dense = next(s for s in sites(tiny(name), ("mlp",)) if s.block == kept.block and s.expert == 2)
    expected = get_consumer_weight(tiny(name), dense)[:, 1::4]
    torch.testing.assert_close(get_consumer_weight(model, kept), expected)


def test_plans_of_experts_are_stored_and_composed() -> None:
    channels = {f"0.mlp.{expert}": SitePlan(32, (0, 8 + expert)) for expert in range(4)}
    first = Plan("mixtral", "auto", channels, experts={"0.mlp": SitePlan(6, (0, 2, 3, 5))})
    assert Plan.from_json(first.to_json()) == first
    assert '"experts"' not in Plan("mixtral", "auto", channels).to_json()
    then = Plan(
        "mixtral", "auto", {"0.mlp.1": SitePlan(2, (1,))}, experts={"0.mlp": SitePlan(4, (1, 3))}
    )
    both = then.after(first)
    assert both.experts == {"0.mlp": SitePlan(6, (2, 5))}
    assert both.sites == {"0.mlp.0": SitePlan(32, (0, 9)), "0.mlp.1": SitePlan(32, (11,))}


def test_every_so_many_tokens_are_taken() -> None:
    model = eager("mixtral")
    every, some = (collected(model, text(model), stride)[0] for stride in (1, 3))
    assert torch.equal(some.logits, every.logits[::3])
    torch.testing.assert_close(some.products, every.products[::3])


def test_blocks_that_can_not_be_run_one_by_one_are_refused() -> None:
    model = tiny("mixtral")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(InputError, match="changes it before block 1; leave them out"):
        chosen_of(model, text(model), 0.75)


def test_what_experts_can_not_be_is_refused() -> None:
    model = tiny("mixtral")
    with pytest.raises(InputError, match="leaves 1 of 4 experts; .* the 2 that"):
        chosen_of(model, text(model), 0.25)
    with pytest.raises(InputError, match="has no experts to remove"):
        chosen_of(tiny("llama"), text(model), 0.5)
    with pytest.raises(InputError, match="both folds need text"):
        chosen_of(model, [tiny_inputs(model, 1, 8)], 0.5)
    layers = {"0.mlp": SitePlan(4, (0,))}
    with pytest.raises(InputError, match="sends every token to 2 experts, the plan keeps 1"):
        apply_plan(model, Plan("mixtral", "auto", {}, experts=layers))
    with pytest.raises(InputError, match="0.mlp has 4 experts, the plan counts 5"):
        apply_plan(model, first_layer("mixtral", (0, 1)))
    with pytest.raises(InputError, match="the model has no site 9.mlp"):
        apply_plan(model, Plan("mixtral", "auto", {}, experts={"9.mlp": SitePlan(4, (0, 1))}))
    layers = {"0.mlp": SitePlan(4, (0, 1, 2))}
    with pytest.raises(InputError, match=r"scales of 0.mlp must have shape \(3,\)"):
        plan = Plan("mixtral", "auto", {}, experts=layers)
        apply_plan(model, plan, {"0.mlp": (torch.ones(2), None)})
    channels = {f"0.mlp.{expert}": SitePlan(32, tuple(range(8))) for expert in range(4)}
    with pytest.raises(InputError, match="the model has no site 0.mlp.3"):
        apply_plan(model, Plan("mixtral", "auto", channels, experts=layers))
