"""Decoders of the table, each on a tiny model: exact slicing, and jobs from end to end."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from covers import cover, slow, some
from folders import equal_plan, make_plan, pruned, read, zero_removed
from journeys import (
    check_hidden,
    check_job,
    check_slicing,
    kinds_of,
    one_of_each_kind,
    says_equal_layers,
)
from seeing import SEEING, seeing_inputs, seeing_model
from tiny import NARROWABLE, batches, class_of, outputs, tiny
from tiny_decoders import DECODERS

from liar_ext import InputError, Plan, apply_plan, load_pruned, prune, save_pruned
from liar_ext.checkpoint.stock_config import describe, how_to_load
from liar_ext.models.plan import SitePlan
from liar_ext.models.registry import FAMILIES, family_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import get_consumer_bias, sites, why_whole
from liar_ext.models.whole import why_lent

TYPES = {name: class_of(name).config_class.model_type for name in DECODERS}
STREAMS = [name for name, model_type in TYPES.items() if FAMILIES[model_type].stream]


@pytest.mark.parametrize("name", DECODERS)
def test_slicing_equals_zeroing(name: str) -> None:
    check_slicing(name)


@some("name", STREAMS, *STREAMS[::3])
def test_hidden_features_that_others_repeat_are_given_back(name: str, monkeypatch) -> None:
    check_hidden(name, monkeypatch, tie_word_embeddings=False)


@pytest.mark.parametrize("name", DECODERS)
def test_biases_that_a_flag_gives_are_said_by_the_stock_config(name: str) -> None:
    """The config is proved by building the stock class from it, with the same names and shapes."""
    model = tiny(name)
    has = [get_consumer_bias(model, site) is not None for site in sites(model)]
    plan = equal_plan(model, kinds_of(model), bias=True)
    apply_plan(model, plan)
    expected = outputs(model)
    describe(model)
    said = all(s.wiring.bias_flag or had for s, had in zip(sites(model), has, strict=True))
    # One key and value for all heads: this plan takes no unit there.
    possible = said and (name == "gpt_bigcode" or says_equal_layers(model))
    assert model.config.liar["layers"] == ("equal" if possible else "unequal")
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("name", [*NARROWABLE, *STREAMS])
@torch.no_grad()
def test_what_norms_add_to_their_weights(name: str) -> None:
    """With weights that cancel it, a norm puts out its bias alone."""
    model = tiny(name)
    added = family_of(model).stream.norm_offset
    for norm in map(model.get_submodule, hidden_of(model).norms):
        if not [*norm.parameters()]:
            assert name == "olmo"
            continue
        norm.weight.fill_(-added)
        output = norm(torch.randn(3, len(norm.weight)))
        bias = getattr(norm, "bias", None)
        assert torch.equal(output, torch.zeros(3, 1) + (0 * output[0] if bias is None else bias))


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("kinds", [("attn",), ("mlp",)])
def test_a_model_that_sees_is_the_same_on_pictures(kinds: tuple[str, ...], name: str) -> None:
    model = seeing_model(name).double()
    inputs = seeing_inputs(name)
    picture = inputs["pixel_values"]
    plan = make_plan(model, kinds)
    zeroed = zero_removed(model, plan)
    dense = outputs(model, inputs)
    apply_plan(model, plan)
    expected = outputs(zeroed, inputs)
    torch.testing.assert_close(outputs(model, inputs), expected)
    assert not torch.allclose(expected, dense)
    inputs["pixel_values"] = -picture
    assert not torch.allclose(outputs(model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("phi3", {"attn_unit": "head"}),
        ("falcon_new", {"attn_unit": "head"}),
        ("phi3", {"keep_hidden": 0.7}),
        slow("nemotron", {"keep_hidden": 0.7, "schedule": "layerwise"}),
        slow("falcon_mha", {"keep_hidden": 0.7}),
        slow("stablelm", {"keep_hidden": 0.7}),
        slow("cohere2", {"keep_hidden": 0.7}),
        ("phi", {"keep_hidden": 0.7, "criterion": "taylor"}),
        ("stablelm", {"keep_hidden": 0.7, "qk_layernorm": True}),
        slow("gemma2", {"keep_hidden": 0.7, "schedule": "layerwise"}),
        slow("olmo2", {"keep_hidden": 0.7}),
        slow("olmo", {"keep_hidden": 0.7, "tie_word_embeddings": True}),
    ],
)
def test_jobs_of_other_choices(name: str, choices: dict, tmp_path: Path) -> None:
    of_config = ("qk_layernorm", "tie_word_embeddings")
    fields = {field: choices[field] for field in of_config if field in choices}
    check_job(name, tmp_path, fields, **{k: v for k, v in choices.items() if k not in fields})


@some("name", ["phi3", "granite", "starcoder2"], "granite")
def test_a_smaller_hidden_size_loads_in_the_stock_class(name, tmp_path: Path) -> None:
    equal = {"uniform_layers": True, "reconstruct": "linear"}
    model = check_job(name, tmp_path, keep_hidden=0.5, **equal)
    fields = read(tmp_path / "one")
    assert fields["liar"]["layers"] == "equal"
    assert fields["hidden_size"] == sites(model)[0].d_out < tiny(name).config.hidden_size


OTHERS = {
    "cohere": ("use_qk_norm", True, "its row is that of models with use_qk_norm=False"),
    "stablelm": ("qk_layernorm", True, "its row is that of models with qk_layernorm=False"),
    "falcon": ("alibi", True, "its row is that of models with alibi=False"),
    "olmo2": ("attention_bias", False, "its q_norm and k_norm run over all heads at once"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_attention_that_cannot_be_pruned_stays_whole_with_a_reason(name: str) -> None:
    field, value, reason = OTHERS[name]
    model = tiny(name, **{field: value})
    assert [site.kind for site in sites(model)] == ["mlp"] * 3
    assert why_whole(model, "mlp") == ""
    with pytest.raises(InputError, match=f"nothing to prune in attn: {reason}"):
        prune(model, batches(model, 2), 0.6, kinds=("attn",))
    with pytest.warns(UserWarning, match=f"attn of {name} stays whole: {reason}"):
        prune(model, batches(model, 2), 0.6)
    assert {site.d_in for site in sites(model, ("mlp",))} != {20}


def test_one_key_and_value_for_all_heads_is_told_of() -> None:
    model = tiny("falcon")
    with pytest.warns(UserWarning, match="share one key and value; give attn_unit='head'"):
        prune(model, batches(model, 2), 0.9)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_module_with_its_own_number_of_the_config_is_copied_with_it(how) -> None:
    """Phi-3 computes where its queries end by the config's number of heads."""
    model, _ = pruned("phi3")
    other = how(model)
    assert torch.equal(outputs(other), outputs(model))
    other.set_attn_implementation("eager")
    attention = other.model.layers[0].self_attn
    assert attention.config._attn_implementation == "eager"
    assert attention.config.num_attention_heads < other.config.num_attention_heads == 8
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    torch.testing.assert_close(outputs(other), outputs(model))


def test_it_is_pruned_again_after_a_loader_that_knows_only_the_folder(tmp_path: Path) -> None:
    model, plan = pruned("phi3")
    save_pruned(model, tmp_path / "one", plan)
    loader = transformers.AutoModelForCausalLM
    loaded = loader.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert "config.num_attention_heads" in str(read(tmp_path / "one")["liar"]["modules"])
    prune(loaded, batches(loaded, 2), 0.8)
    expected = outputs(loaded.eval())
    save_pruned(loaded, tmp_path / "two", loaded.liar_plan)
    again = loader.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert torch.equal(outputs(again.eval()), expected)


def test_scaled_rotary_frequencies_keep_their_number() -> None:
    """Their factors are checked by the config, which derives their number from the heads."""
    rope = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    rope |= {"rope_theta": 1e4, "partial_rotary_factor": 1.0}
    fields = {"hidden_size": 32, "num_attention_heads": 8, "original_max_position_embeddings": 32}
    model = tiny("phi3", rope_parameters=rope, **fields)
    plan = equal_plan(model)
    apply_plan(model, plan)
    assert "trust_remote_code" in how_to_load(model, plan)
    describe(model)
    assert model.config.liar["layers"] == "unequal"


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4"])
def test_layers_that_differ_in_the_dense_model_stay_stock_if_pruned_alike(name, tmp_path):
    """The last MLP is twice as wide, and heads have a size of their own in the dense config."""
    model, plan = pruned(name, equal_plan, kinds=("mlp",))
    save_pruned(model, tmp_path / "alike", plan)
    loaded = type(model).from_pretrained(tmp_path / "alike").eval()
    assert torch.equal(outputs(loaded), outputs(model))
    assert read(tmp_path / "alike")["liar"]["layers"] == "equal"

    one = sites(model)[0]
    other = Plan(model.config.model_type, "auto", {one.name: SitePlan.first(one.units, 4)})
    apply_plan(model, other)
    save_pruned(model, tmp_path / "other", other)
    assert read(tmp_path / "other")["liar"]["layers"] == "unequal"
    assert torch.equal(outputs(load_pruned(tmp_path / "other").eval()), outputs(model))


@cover(1, name=one_of_each_kind(DECODERS), layers=["unequal", "equal"])
def test_a_job(name: str, layers: str, tmp_path: Path) -> None:
    """In one pass with layers of unequal sizes, or layerwise with those of equal ones.

    Curves, which cost a fifth of a job, read nothing of a family that solves don't read, too.
    """
    if layers == "unequal":
        check_job(name, tmp_path, schedule="one-pass", allocation="global", criterion="wifv")
        # Of these only the MLPs have several sites, by chance alike.
        alike = ("bamba", "olmo2", "gemma4_text", "codegen")
        assert read(tmp_path / "one")["liar"]["layers"] == "unequal" or name in alike
        return
    equal = {"uniform_layers": True, "reconstruct": "linear", "schedule": "layerwise"}
    equal["allocation"] = "uniform"
    if why_lent(tiny(name)):
        equal["schedule"] = "one-pass"
    model = check_job(name, tmp_path, **equal)
    said = "equal" if says_equal_layers(model) else "unequal"
    assert read(tmp_path / "one")["liar"]["layers"] == said
