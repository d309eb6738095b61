"""What can't be described is refused with the reason, and hostile models do no harm."""

from __future__ import annotations

import math
import re

import pytest
import torch
from suggest import odd
from suggest.odd import OddConfig, OddModel, variant
from tiny import tiny
from torch import nn
from transformers import AutoConfig, LlamaConfig, Mamba2Config, Olmo2Config

from liar_ext.models.registry import FAMILIES
from liar_ext.suggest.suggest import suggest_family, suggest_for
from liar_ext.system.errors import InputError


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """None of these families is known, and the table stays as it is."""
    for name in ("llama", "olmo2", "qwen2_moe"):
        monkeypatch.delitem(FAMILIES, name, raising=False)
    before = dict(FAMILIES)
    yield
    assert FAMILIES == before


def test_a_norm_over_all_heads_is_named_and_the_mlp_described():
    found = suggest_family(Olmo2Config(architectures=["Olmo2ForCausalLM"])).family
    assert found.attn is None and found.mlp.consumer == "mlp.down_proj"
    assert "heads are mixed by self_attn.k_norm, self_attn.q_norm" in found.without["attn"]


@pytest.mark.parametrize(
    "gaze, reason",
    [
        (odd.MixedGaze, "gaze.tell.*heads are mixed by gaze.blend"),
        (odd.BareGaze, "no linear layer that attention writes was found"),
    ],
)
def test_attention_that_no_row_can_name_is_left_out(gaze, reason):
    model = variant("Other", stratum_class=odd.stratum_with(gaze))(OddConfig())
    found = suggest_family(model).family
    assert found.attn is None and found.mlp.consumer == "fall"
    assert re.search(reason, found.without["attn"])


def test_experts_are_left_out_and_the_mlp_beside_them():
    found = suggest_family(AutoConfig.for_model("qwen2_moe")).family
    assert found.mlp is None and found.attn.consumer == "self_attn.o_proj"
    assert found.without["mlp"] == "mlp.experts holds experts, which aren't looked for"


def test_an_mlp_with_a_norm_over_its_channels_is_left_out():
    found = suggest_family(variant("Other", stratum_class=odd.NormedStratum)(OddConfig())).family
    assert found.mlp is None and found.attn.consumer == "gaze.tell"
    assert "no linear layer that reads channels one by one" in found.without["mlp"]


@pytest.mark.parametrize(
    "model_class, reason",
    [
        (odd.Loose, "no list of blocks"),
        (odd.Between, "strata don't read, once each, what the one before gives"),
        (odd.Raising, "KeyError: 'no tokens today'"),
        (variant("Sound", main_input_name="input_values"), "takes input_values"),
    ],
)
def test_models_without_a_row_are_refused(model_class, reason):
    with pytest.raises(InputError, match=f"no row for 'odd': .*{reason}.*by hand"):
        suggest_family(model_class(OddConfig()))


def test_huge_sizes_are_made_small_before_anything_is_built(monkeypatch):
    """Each layer alone would take more memory than there is."""
    sizes = []
    real = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *shape, **settings: sizes.append(shape) or real(*shape, **settings),
    )
    config = LlamaConfig(
        hidden_size=2**30,
        intermediate_size=2**34,
        num_attention_heads=2**20,
        num_key_value_heads=2**10,
        vocab_size=2**40,
        num_hidden_layers=10**9,
        max_position_embeddings=2**40,
        architectures=["LlamaForCausalLM"],
    )
    found = suggest_family(config)
    assert found.family.mlp.producers == ("mlp.gate_proj", "mlp.up_proj")
    few = "only a few blocks were looked at: not all of them can be built"
    assert found.notes[0] == few
    numbers = [n for shape in sizes for n in shape if isinstance(n, int)]
    assert numbers and max(numbers) < 10_000


def test_huge_sizes_without_names_are_refused():
    config = OddConfig(swell=2**34)
    with torch.device("meta"):
        model = OddModel(config)
    with pytest.raises(InputError, match="its config can't be made smaller"):
        suggest_family(model)
    with pytest.raises(InputError, match="more than 5,000 modules"):
        suggest_family(_with_layers(model, 10**9))


def _with_layers(model, strata):
    model.config.strata = strata
    return model


@pytest.mark.parametrize("thing", [None, "llama", nn.Linear(2, 2), {"model_type": "llama"}])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(InputError, match="takes a model of transformers or its config"):
        suggest_family(thing)


def test_a_config_without_a_class_is_refused():
    with pytest.raises(InputError, match="has no model class for OddConfig; build the model"):
        suggest_family(OddConfig())


@pytest.mark.exhaustive
def test_a_config_with_an_infinite_number_is_read(tmp_path):
    Mamba2Config(
        **{"num_heads": 8, "head_dim": 16, "hidden_size": 64, "num_hidden_layers": 2},
        **{"state_size": 16, "n_groups": 2, "vocab_size": 99, "time_step_limit": (0.0, math.inf)},
    ).save_pretrained(tmp_path)
    assert '"Infinity"' in (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match="no row for 'mamba2'"):
        suggest_for(str(tmp_path))


def test_a_model_is_left_as_it_is():
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fields = model.config.to_dict()
    suggest_family(model)
    assert model.config.to_dict() == fields
    assert not model.training
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
