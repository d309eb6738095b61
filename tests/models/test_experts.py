"""Experts as sites: what reaches them, by brute force over tokens, and what slicing leaves."""

from __future__ import annotations

import pytest
import torch
from folders import check_sliced
from tiny import MOE, eager, experts_of, given, outputs, routes, tiny, tiny_inputs
from torch import nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.taps import watched
from liar_ext.models.layers import layer_at
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import get_consumer_bias, get_consumer_weight, sites, teams_of
from liar_ext.models.slicing import apply_plan
from liar_ext.ops.reference import symmetric
from liar_ext.system.errors import InputError

NAMES = list(MOE)
ALL = [*MOE, "llama4_text"]  # where routers scale what experts give, and what they read


def padded(model: nn.Module, batch: int = 4, tokens: int = 9) -> dict:
    """Return inputs with some padding, and folds."""
    inputs = tiny_inputs(model, batch, tokens)
    inputs["attention_mask"][1, 6:] = inputs["attention_mask"][2, 3:] = 0
    return {**inputs, "fold": torch.tensor([0, 1, 1, 0])}


def calls(model: nn.Module, inputs: dict) -> dict[str, tuple]:
    """Return the routes of every module of experts, and what it gives, by path."""
    seen: dict[str, tuple] = {}
    paths = {site.consumer.rpartition(".")[0] for site in experts_of(model)}

    def note(path: str):
        return lambda args, out: seen.update({path: (*routes(model, args), given(model, out))})

    whole = {name: value for name, value in inputs.items() if name != "fold"}
    contexts = [watched(model.get_submodule(path), note(path)) for path in paths]
    for context in contexts:
        context.__enter__()
    outputs(model, whole)
    for context in contexts:
        context.__exit__(None, None, None)
    return seen


def read_by_hand(model: nn.Module, site, h: torch.Tensor) -> torch.Tensor:
    """Return what an expert's consumer reads of one token, spelled out for the family."""
    module = model.get_submodule(site.consumer.rpartition(".")[0])
    if model.config.model_type == "llama4_text":
        gate, up = (h @ module.gate_up_proj[site.expert]).chunk(2)
        return up * nn.functional.silu(gate)
    if model.config.model_type != "gpt_oss":
        rows = module.gate_up_proj[site.expert] @ h
        gate, up = rows[: site.units], rows[site.units :]
        return nn.functional.silu(gate) * up
    rows = h @ module.gate_up_proj[site.expert] + module.gate_up_proj_bias[site.expert]
    gate, up = rows[0::2].clamp(max=module.limit), rows[1::2].clamp(-module.limit, module.limit)
    return (up + 1) * gate * torch.sigmoid(module.alpha * gate)


@pytest.mark.parametrize("name", ALL)
def test_the_moments_of_an_expert_are_those_of_its_tokens(name: str) -> None:
    model = eager(name)
    inputs = padded(model)
    bank = calibrate(model, [inputs])
    seen, used = calls(model, inputs), inputs["attention_mask"].flatten().bool()
    fold = inputs["fold"].repeat_interleave(9)
    for site in experts_of(model):
        read, chosen, weights, _ = seen[site.consumer.rpartition(".")[0]]
        gram = torch.zeros(2, site.d_in, site.d_in, dtype=torch.float64)
        total, count = torch.zeros(2, site.d_in, dtype=torch.float64), torch.zeros(2)
        routed = [0, 0]
        for token in range(len(read)):
            for place in range(chosen.shape[1]):
                if used[token] and chosen[token, place] == site.expert:
                    h, r = read[token, site.expert], weights[token, place].double()
                    x = read_by_hand(model, site, h)
                    gram[fold[token]] += r**2 * torch.outer(x, x)
                    total[fold[token]] += r**2 * x
                    count[fold[token]] += r**2
                    routed[fold[token]] += 1
        moments = bank[site.name]
        torch.testing.assert_close(symmetric(moments.gram), gram)
        torch.testing.assert_close(moments.total, total)
        torch.testing.assert_close(moments.tokens.float(), count.float())
        assert bank.source["routed"][site.name] == routed
    assert bank.source["tokens"] == int(used.sum())


@pytest.mark.parametrize("name", ALL)
def test_the_consumers_of_a_layer_add_up_to_its_output(name: str) -> None:
    model = eager(name)
    inputs = tiny_inputs(model)
    for team in teams_of(experts_of(model)).values():
        read, chosen, weights, output = calls(model, inputs)[team[0].consumer.rpartition(".")[0]]
        total = torch.zeros_like(output)
        for site in team:
            bias = get_consumer_bias(model, site)
            for token, place in (chosen == site.expert).nonzero().tolist():
                x = read_by_hand(model, site, read[token, site.expert])
                y = get_consumer_weight(model, site) @ x
                total[token] += weights[token, place] * (y if bias is None else y + bias)
        torch.testing.assert_close(output, total)


def plan_of(model: nn.Module, kept: int, seed: int = 0) -> Plan:
    """Return a plan that keeps units drawn anew for each site, equally many of each expert."""
    generator = torch.Generator().manual_seed(seed)
    planned = {}
    for site in sites(model):
        count = kept if site.unit == "channel" else site.units // 2
        order = torch.randperm(site.units, generator=generator)[:count]
        planned[site.name] = SitePlan(site.units, tuple(sorted(order.tolist())))
    return Plan(model.config.model_type, "auto", planned)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_sliced_equals_zeroed(name: str, implementation: str) -> None:
    model = tiny(name)
    model.set_experts_implementation(implementation)
    pruned = check_sliced(model, plan_of(model, 8), rtol=1e-4, atol=1e-5)
    assert {site.units for site in sites(pruned, ("mlp",))} == {8}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_query_heads_leave_with_all_that_is_theirs(name: str) -> None:
    model = tiny(name)
    planned = {
        site.name: SitePlan(site.units, tuple(range(0, site.units, 2)))
        for site in sites(model, ("attn",), "head")
    }
    check_sliced(model, Plan(name, "head", planned), rtol=1e-4, atol=1e-5)


def test_writing_to_an_expert_s_layer_writes_to_the_model() -> None:
    model = tiny("mixtral")
    site = experts_of(model)[2]
    with torch.no_grad():
        layer_at(model, site.consumer, site.expert).weight.fill_(3.0)
    weights = model.model.layers[0].mlp.experts.down_proj
    assert (weights[2] == 3.0).all() and not (weights[1] == 3.0).any()


def test_banks_of_experts_add_up_and_are_stored(tmp_path) -> None:
    model = eager("mixtral")
    one, other = padded(model), {**padded(model), **tiny_inputs(model, 4, 9, seed=5)}
    bank, more = calibrate(model, [one]), calibrate(model, [other])
    both = calibrate(model, [one, other])
    bank.merge(more)
    bank.save(tmp_path / "bank.safetensors")
    loaded = MomentBank.load(tmp_path / "bank.safetensors")
    assert loaded.source["routed"] == both.source["routed"]
    for name in both:
        torch.testing.assert_close(loaded[name].gram.tril(), both[name].gram.tril())


def test_what_experts_can_not_keep_is_refused() -> None:
    model = tiny("mixtral")
    uneven = {
        site.name: SitePlan(32, tuple(range(8 + 8 * (site.expert == 1))))
        for site in experts_of(model)
    }
    with pytest.raises(InputError, match="0.mlp must keep equally many channels of each of its 4"):
        apply_plan(model, Plan("mixtral", "auto", uneven))
    with pytest.raises(InputError, match="got 8, 32; name all of them"):
        apply_plan(model, Plan("mixtral", "auto", {"0.mlp.1": SitePlan(32, tuple(range(8)))}))
    biased = {site.name: SitePlan(32, tuple(range(8)), bias=True) for site in experts_of(model)}
    with pytest.raises(InputError, match="the consumer of 0.mlp.0 has no bias"):
        apply_plan(model, Plan("mixtral", "auto", biased))
    with pytest.raises(InputError, match="'olmoe' has nothing to prune in attn: its q_norm"):
        sites(tiny("olmoe"), ("attn",))
