"""Slicing equals zeroing, on every family; errors leave the model as it was."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from folders import check_sliced, make_plan, zero_removed
from tiny import CAUSAL, GROUPED, TINY, outputs, tiny, tiny_inputs
from tiny_encoders import SEQ2SEQ
from torch import nn

from liar_ext.models.family import Family, Stack, Wiring, stream
from liar_ext.models.plan import Budget, Plan, SitePlan
from liar_ext.models.registry import FAMILIES
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan, unit_rows
from liar_ext.selection.costs import total_cost
from liar_ext.system.errors import InputError


@pytest.mark.parametrize("kinds", [("attn",), ("mlp",), ("attn", "mlp")])
@pytest.mark.parametrize("name", TINY)
def test_sliced_equals_zeroed(name: str, kinds: tuple[str, ...]) -> None:
    model = tiny(name, dtype=torch.float64)
    # Norms and position tables compute in float32 inside, whatever the dtype of the model.
    check_sliced(model, make_plan(model, kinds), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("attn_unit", ["head", "kv_group"])
@pytest.mark.parametrize("name", GROUPED)
def test_units_of_grouped_attention(name: str, attn_unit: str, attention: str) -> None:
    model = tiny(name)
    model.set_attn_implementation(attention)
    plan = make_plan(model, ("attn",), attn_unit)
    model = check_sliced(model, plan, rtol=1e-5, atol=1e-5)
    kept = sites(model, ("attn",), attn_unit)
    assert [site.units for site in kept] == [len(plan.sites[site.name].kept) for site in kept]
    assert all(site.kv_heads == (4 if attn_unit == "head" else site.units) for site in kept)


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_unequal_layers_generate(name: str) -> None:
    model = tiny(name)
    plan = make_plan(model)
    zeroed = zero_removed(model, plan)
    apply_plan(model, plan)
    assert len({site.d_in for site in sites(model, ("mlp",))}) > 1
    inputs = {k: v for k, v in tiny_inputs(model).items() if "decoder" not in k}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    # With the cache, which is sized by the heads of each layer, and without it.
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    assert torch.equal(cached, zeroed.generate(**inputs, **settings))


@pytest.mark.parametrize("name", TINY)
def test_keeping_everything_is_the_identity(name: str) -> None:
    model = tiny(name)
    before = copy.deepcopy(model)
    chosen = sites(model)
    keep_all = {site.name: SitePlan(site.units, tuple(range(site.units))) for site in chosen}
    apply_plan(model, Plan(model.config.model_type, "auto", keep_all))
    apply_plan(model, Plan(model.config.model_type, "auto", {}))
    assert sites(model) == chosen
    assert torch.equal(outputs(model), outputs(before))
    for (key, ours), (_, theirs) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "mpnet", "gpt_neox"])
def test_pruning_twice_composes(name: str) -> None:
    once, twice = tiny(name), tiny(name)
    first = make_plan(once)
    apply_plan(twice, first)
    second = make_plan(twice)
    apply_plan(twice, second)
    both = {
        name: SitePlan(plan.units, tuple(plan.kept[unit] for unit in second.sites[name].kept))
        for name, plan in first.sites.items()
    }
    apply_plan(once, replace(first, sites=both))
    assert torch.equal(outputs(once), outputs(twice))


@pytest.mark.parametrize("name", TINY)
def test_given_weights_and_biases_are_used(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    plan = make_plan(model, bias=True)
    weights = {}
    zeroed = zero_removed(model, plan)
    for site in sites(model):
        kept = site.features(plan.sites[site.name].kept)
        weight = torch.randn(site.d_out, len(kept), dtype=torch.float64) / 8
        bias = torch.randn(site.d_out, dtype=torch.float64) / 8
        weights[site.name] = (weight, bias)
        get_consumer_weight(zeroed, site)[:, kept] = weight
        consumer = zeroed.get_submodule(site.consumer)
        consumer.bias = nn.Parameter(bias.clone())
    apply_plan(model, plan, weights)
    for site in sites(model):
        assert torch.equal(get_consumer_weight(model, site), weights[site.name][0])
        assert torch.equal(get_consumer_bias(model, site), weights[site.name][1])
    torch.testing.assert_close(outputs(model), outputs(zeroed), rtol=1e-6, atol=1e-6)


def test_biases_follow_the_config_flag() -> None:
    """The stock class has either all biases that a flag governs, or none."""
    model = tiny("llama")
    expected = outputs(model)
    site = sites(model)[0]
    keep_all = SitePlan(site.units, tuple(range(site.units)), bias=True)
    apply_plan(model, Plan("llama", "auto", {"0.attn": keep_all}))
    assert torch.equal(outputs(model), expected)
    stock = type(model)(type(model.config)(**{**model.config.to_dict(), "attention_bias": True}))
    assert model.state_dict().keys() == stock.state_dict().keys()


def test_only_the_consumer_gains_a_bias_without_a_flag() -> None:
    model = tiny("mistral")
    before = model.state_dict().keys()
    apply_plan(model, make_plan(model, ("mlp",), bias=True))
    gained = model.state_dict().keys() - before
    assert gained == {f"model.layers.{block}.mlp.down_proj.bias" for block in range(3)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_keep_dtype_and_requires_grad(dtype: torch.dtype) -> None:
    model = tiny("qwen2", dtype=dtype).requires_grad_(False)
    site = sites(model, ("mlp",))[0]
    plan = make_plan(model, bias=True)
    kept = len(plan.sites["0.mlp"].kept)
    apply_plan(model, plan, {"0.mlp": (torch.ones(site.d_out, kept, dtype=torch.float64), None)})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(get_consumer_weight(model, site), torch.ones(site.d_out, kept, dtype=dtype))
    trainable = tiny("qwen2")
    apply_plan(trainable, make_plan(trainable, bias=True))
    assert all(parameter.requires_grad for parameter in trainable.parameters())
    outputs_of = trainable(**tiny_inputs(trainable)).logits
    outputs_of.sum().backward()
    assert all(
        trainable.get_submodule(site.consumer).weight.grad is not None for site in sites(trainable)
    )


@pytest.mark.parametrize("name", TINY)
def test_modules_agree_with_their_weights(name: str) -> None:
    model = tiny(name)
    apply_plan(model, make_plan(model))
    for site in sites(model):
        for layer in (model.get_submodule(path) for path in (*site.producers, site.consumer)):
            if site.wiring.transposed:
                assert (layer.nx, layer.nf) == tuple(layer.weight.shape)
            else:
                assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)


def test_a_pruned_mpnet_copies_and_pickles() -> None:
    model = tiny("mpnet")
    apply_plan(model, make_plan(model))
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), expected)


def test_query_heads_of_one_key_and_value() -> None:
    """Multi-query attention: the one key and value stay, also where nothing else shares them."""
    model = tiny("llama", num_key_value_heads=1, dtype=torch.float64)
    plan = make_plan(model, ("attn",), "head")
    expected = outputs(zero_removed(model, plan))
    apply_plan(model, plan)
    torch.testing.assert_close(outputs(model), expected)
    site = sites(model, ("attn",), "head")[0]
    assert site.sizes["kv_heads"] == 1 and site.keys_stay and site.sizes["heads"] < 8
    with pytest.raises(InputError, match="heads leave keys and values behind"):
        total_cost(model, [site], Budget(0.5, of="kv_cache"))


def test_wrong_words_of_rows_are_refused(monkeypatch) -> None:
    with pytest.raises(InputError, match="stacked must name producers, got fc3"):
        Wiring(("fc1",), "fc2", stacked={"fc3": Stack(("query",))})
    with pytest.raises(InputError, match="without may name attn, .*, got heads"):
        Family("x", "layers", None, None, without={"heads": "no"})
    ends = ["norm norm", "read lm_head"]
    for start, block in (("write", "reads"), ("write", "site_if"), ("site", "read")):
        row = stream([f"{start} embed_tokens"], [f"{block} mlp.up_proj"], ends)
        monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], stream=row))
        with pytest.raises(InputError, match="a step may write, norm, .*, got '(reads|site)'"):
            hidden_of(tiny("llama"))


def test_a_family_without_a_kind_of_site_lists_the_others(monkeypatch) -> None:
    model, row = tiny("llama"), FAMILIES["llama"]
    without = {"attn": "its heads are normalised together"}
    monkeypatch.setitem(FAMILIES, "llama", replace(row, attn=None, without=without))
    assert [site.kind for site in sites(model)] == ["mlp"] * 3
    with pytest.raises(InputError, match="nothing to prune in attn: its heads are norm"):
        sites(model, ("attn",))


STACKS = {
    "matrix by matrix": (Stack(("query", "key", "value")), [0, 0, 1, 1, 0, 1, 0, 1]),
    "group by group": (Stack(("query", "key", "value"), True), [0, 0, 0, 0, 1, 1, 1, 1]),
    "keys first, by group": (Stack(("key", "query"), True), [0, 0, 0, 1, 1, 1]),
    "two of channels": (Stack(("gate", "up")), [0, 0, 1, 1, 0, 0, 1, 1]),
}


def stacked(stack: Stack, unit: str, units: int, kv_heads: int) -> Site:
    """Return a site of units of two features that has such a producer, ``x``."""
    wiring = Wiring(("x",), "y", stacked={"x": stack})
    sizes = {"units": units, "width": 2, "d_in": 2 * units, "kv_heads": kv_heads, "head_dim": 2}
    return replace(sites(tiny("gpt2"))[0], wiring=wiring, unit=unit, **sizes)


@pytest.mark.parametrize("case", STACKS)
def test_units_of_stacked_rows(case: str) -> None:
    stack, expected = STACKS[case]
    unit, kv_heads = ("kv_group", 2) if stack.shared else ("channel", 0)
    site = stacked(stack, unit, 2, kv_heads)
    assert site.row_units("x", len(expected)).tolist() == expected


def test_keys_and_values_stay_where_query_heads_leave() -> None:
    stack = Stack(("query", "key", "value"))
    units = [0, 0, 1, 1, 2, 2, 3, 3]  # four heads of two rows, two KV heads
    assert stacked(stack, "head", 4, 2).row_units("x", 16).tolist() == units + [-1] * 8
    grouped = [*units[:4], *[-1] * 4, *units[4:], *[-1] * 4]
    by_group = stacked(stack._replace(by_group=True), "head", 4, 2)
    assert by_group.row_units("x", 16).tolist() == grouped


def test_rows_of_stacked_producers() -> None:
    site = sites(tiny("gpt2"))[0]
    # Eight rows a head, four heads, and q, k, v stacked.
    rows = unit_rows(site, site.producers[0], (1, 3), 96).tolist()
    assert rows == [row for row in range(96) if row // 8 % 2]


BAD_PLANS = {
    "another model type": (lambda plan: replace(plan, model_type="bert"), "plan is for 'bert'"),
    "more sites than the model has": (
        lambda plan: replace(plan, sites={**plan.sites, "7.mlp": plan.sites["0.mlp"]}),
        "no site 7.mlp",
    ),
    "another unit count": (
        lambda plan: replace(plan, sites={**plan.sites, "2.mlp": SitePlan(23, (0, 1))}),
        "2.mlp has 24 units .channel., the plan counts 23; is the model pruned already",
    ),
    "unequal groups": (
        lambda plan: Plan("llama", "head", {"0.attn": SitePlan(8, (0, 1, 2, 4, 6))}),
        r"equally many heads in each of its 4 KV groups, got \[2, 1, 1, 1\]",
    ),
    "an empty group": (
        lambda plan: Plan("llama", "head", {"0.attn": SitePlan(8, (0, 2, 4))}),
        r"got \[1, 1, 1, 0\]",
    ),
    "an unknown unit": (lambda plan: replace(plan, attn_unit="row"), "attn_unit must be one of"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_changes_nothing(case: str) -> None:
    change, message = BAD_PLANS[case]
    model = tiny("llama")
    expected, before = outputs(model), sites(model)
    with pytest.raises(InputError, match=message):
        apply_plan(model, change(make_plan(model, bias=True)))
    assert sites(model) == before
    assert torch.equal(outputs(model), expected)


def test_a_plan_for_the_dense_model_is_refused_by_the_pruned_one() -> None:
    model = tiny("llama")
    plan = make_plan(model)
    apply_plan(model, plan)
    with pytest.raises(InputError, match="pruned already"):
        apply_plan(model, plan)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"9.mlp": (torch.ones(40, 12), None)}, "plan doesn't name"),
        ({"0.mlp": (torch.ones(40, 11), None)}, r"must have shape \(40, 12\), got \(40, 11\)"),
        ({"0.mlp": (torch.ones(40, 12), torch.ones(7))}, r"bias of 0.mlp must have shape \(40,\)"),
        ({"0.mlp": (torch.ones(40, 12), torch.ones(40))}, "the consumer of 0.mlp has no bias"),
    ],
)
def test_bad_weights_change_nothing(weights: dict, message: str) -> None:
    model = tiny("llama")
    before = sites(model)
    with pytest.raises(InputError, match=message):
        apply_plan(model, make_plan(model), weights)
    assert sites(model) == before
