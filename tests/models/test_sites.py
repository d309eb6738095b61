"""Sites of every family, counted against the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from covers import cover
from tiny import GROUPED, TINY, seen_at, tiny, tiny_inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.registry import FAMILIES, family_of, register_family
from liar_ext.models.sites import get_consumer_bias, get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.suggest.suggest import suggest_family
from liar_ext.system.errors import InputError


def drop_one(model: nn.Module, name: str, attn_unit: str = "auto") -> None:
    """Remove the last unit of each run of one site."""
    site = next(site for site in sites(model, attn_unit=attn_unit) if site.name == name)
    run = site.units // site.groups
    kept = tuple(unit for unit in range(site.units) if unit % run != run - 1)
    apply_plan(model, Plan(model.config.model_type, attn_unit, {name: SitePlan(site.units, kept)}))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_sites_of_task_model_and_base_model(name: str) -> None:
    model = tiny(name)
    found = sites(model)
    assert [site.name for site in found] == [f"{i}.{k}" for i in range(3) for k in ("attn", "mlp")]
    assert [site.block for site in found] == [0, 0, 1, 1, 2, 2]
    for site in found:
        weight = get_consumer_weight(model, site)
        assert weight.shape == (site.d_out, site.d_in) == (site.d_out, site.units * site.width)
        assert weight.data_ptr() == model.get_submodule(site.consumer).weight.data_ptr()
        bias = get_consumer_bias(model, site)
        assert bias is None or bias.shape == (site.d_out,)
        assert site.params == site.units * site.unit_params
        assert site.groups == 1
    base = sites(model.base_model)
    assert [(site.name, site.d_in) for site in base] == [(site.name, site.d_in) for site in found]


@pytest.mark.parametrize("name", TINY)
def test_consumer_weight_maps_inputs_to_outputs(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    for site in sites(model)[:2]:
        (x,), y = seen_at(model, [site.consumer], tiny_inputs(model))[site.consumer]
        expected = x @ get_consumer_weight(model, site).T
        bias = get_consumer_bias(model, site)
        torch.testing.assert_close(y, expected if bias is None else expected + bias)


@cover(1, attn_unit=["auto", "head"], name=TINY)
def test_costs_are_what_leaves(name: str, attn_unit: str) -> None:
    """Parameters by counting; FLOPs by torch's own counter, attention spelled out."""
    for kind in ("attn", "mlp"):
        model = tiny(name)
        model.set_attn_implementation("eager")
        inputs = tiny_inputs(model, batch=1, tokens=9)
        tokens = 5 if "pixel_values" in inputs else 9
        site = next(s for s in sites(model, (kind,), attn_unit) if s.block == 1)
        params, flops = count(model), count_flops(model, inputs)
        drop_one(model, site.name, attn_unit)
        assert params - count(model) == site.groups * site.unit_params
        assert flops - count_flops(model, inputs) == site.groups * site.unit_flops(tokens)


@torch.no_grad()
def count_flops(model: nn.Module, inputs: dict) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_query_attention(name: str) -> None:
    model = tiny(name)
    group = sites(model, ("attn",))[0]
    assert (group.unit, group.units, group.width, group.groups) == ("kv_group", 4, 8, 1)
    head = sites(model, ("attn",), "head")[0]
    assert (head.unit, head.units, head.width, head.groups) == ("head", 8, 4, 4)
    assert len(group.producers) == 3 and len(head.producers) == 1
    assert group.sizes == head.sizes
    assert group.sizes["heads"] == 8 and group.sizes["group_size"] == 2


def test_heads_of_plain_attention_are_kv_groups_of_one() -> None:
    model = tiny("bert")
    head, group = (sites(model, ("attn",), unit)[0] for unit in ("head", "kv_group"))
    assert replace(group, unit="head") == head


def test_sizes_are_read_from_the_modules() -> None:
    model = tiny("llama")
    drop_one(model, "1.mlp")
    drop_one(model, "2.attn")
    assert [site.units for site in sites(model)] == [4, 24, 4, 23, 3, 24]
    assert sites(model, ("attn",))[2].sizes["heads"] == 6


def test_which_config_flags_store_a_bias() -> None:
    flags = {
        name: [site.wiring.bias_flag for site in sites(tiny(name))[:2]]
        for name in ("llama", "qwen2", "qwen3", "bert")
    }
    assert flags == {
        "llama": ["attention_bias", "mlp_bias"],
        "qwen2": [None, None],
        "qwen3": ["attention_bias", None],
        "bert": [None, None],
    }


def test_values_of_features_are_summed_to_units() -> None:
    attn, mlp = sites(tiny("llama"))[:2]
    features = torch.arange(attn.d_in, dtype=torch.float64)
    summed = [sum(range(u * attn.width, (u + 1) * attn.width)) for u in range(attn.units)]
    assert attn.per_unit(features).tolist() == summed
    for site in (attn, mlp):
        units = torch.randn(site.units)
        assert torch.equal(site.per_unit(units), units)
    with pytest.raises(InputError, match="0.attn takes 4 values by unit or 32 by feature, got"):
        attn.per_unit(torch.zeros(8))


def test_an_unknown_architecture_is_told_how_to_register() -> None:
    model = tiny("llama")
    model.config.model_type = "my_llama"
    with pytest.raises(InputError, match="unknown architecture 'my_llama'.*`liar families` lists"):
        sites(model)
    with pytest.raises(InputError, match="register_family"):
        sites(nn.Linear(2, 2))
    with pytest.raises(InputError, match="needs a loaded model, got str; load it with"):
        sites("MODEL")
    try:
        register_family(replace(FAMILIES["llama"], name="my_llama"))
        assert family_of(model).name == "my_llama"
        assert len(sites(model)) == 6
    finally:
        FAMILIES.pop("my_llama", None)


def test_a_number_that_the_blocks_lack_is_refused(monkeypatch) -> None:
    """Written by a wrong name it would be another number, which nothing reads."""
    row = FAMILIES["llama"]
    wrong = replace(row.attn, numbers={"num_key_value_groups": "group_size"})
    monkeypatch.setitem(FAMILIES, "llama", replace(row, attn=wrong))
    with pytest.raises(InputError, match="0.attn has no number 'num_key_value_groups'"):
        sites(tiny("llama"))


def test_the_advice_in_the_error_gives_a_family_that_works() -> None:
    model = tiny("llama")
    expected = [site.name for site in sites(model)]
    model.config.model_type = "my_llama"
    with pytest.raises(InputError, match=r"liar families --suggest MODEL.*suggest_family\(model\)"):
        sites(model)
    try:
        register_family(suggest_family(model).family)
        assert [site.name for site in sites(model)] == expected
    finally:
        FAMILIES.pop("my_llama", None)


def test_a_family_that_does_not_fit_is_an_error() -> None:
    model = tiny("llama")
    model.config.model_type = "bert"
    with pytest.raises(InputError, match="no 'model.encoder.layer'"):
        sites(model)
    model.config.model_type = "gpt_neox"
    with pytest.raises(InputError, match="lacks one of attention.query_key_value"):
        sites(model)


@pytest.mark.parametrize("settings", [{"kinds": ("mlp", "norm")}, {"kinds": ()}, {"attn_unit": 1}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(InputError, match="must be"):
        sites(tiny("llama"), **settings)


def test_one_part_of_a_model() -> None:
    model = tiny("whisper")
    everything = [site.name for site in sites(model)]
    for part in ("encoder", "decoder"):
        expected = [name for name in everything if name.startswith(f"{part}.")]
        assert [site.name for site in sites(model, ("attn", "mlp", part))] == expected
    found = [site.name for site in sites(model, ("mlp", "encoder"))]
    assert found == [f"encoder.{index}.mlp" for index in range(2)]
    with pytest.raises(InputError, match="'bert' has no part decoder"):
        sites(tiny("bert"), ("attn", "mlp", "decoder"))
    with pytest.raises(InputError, match="must be some of attn, mlp, encoder, decoder"):
        sites(model, ("encoder",))


def test_quantised_weights_are_refused() -> None:
    model = tiny("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="floating-point weights.*dequantised"):
        sites(model)


class Int4(torch.Tensor):
    """As of torchao; weights that FSDP or tensor parallelism has split are subclasses, too."""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weight: weight.as_subclass(Int4), "Int4 of torch.float32"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "Tensor of torch.float8_e4m3fn"),
    ],
)
def test_weights_that_operators_of_torch_cannot_read_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    model = tiny("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(change(layer.weight.detach()))
    with pytest.raises(InputError, match=f"got {expected}; load the model dequantised"):
        sites(model)
