"""Sizes of layers as a saved config gives them, beside the weights of the same folder."""

from __future__ import annotations

import json

import pytest
import torch
from folders import equal_plan, make_plan, pruned
from safetensors.torch import load_file
from tiny import GROUPED, tiny_config
from transformers import AutoConfig

from liar_ext import save_pruned
from liar_ext.integrations.vllm import (
    PROJECTION,
    check_shapes,
    check_tensor_parallel,
    expected_shape,
    is_pruned,
)
from liar_ext.system.errors import InputError


def config_of(folder):
    return AutoConfig.from_pretrained(folder).get_text_config()


@pytest.fixture(scope="module", params=GROUPED)
def unequal(request, tmp_path_factory):
    """The config and the weights of a saved folder with unequal layers and affine biases."""
    folder = tmp_path_factory.mktemp(request.param) / "saved"
    model, plan = pruned(request.param, make_plan, bias=True)
    save_pruned(model, folder, plan)
    return config_of(folder), load_file(folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path):
    """A folder with unequal layers, and what changes its config.json."""
    model, plan = pruned("llama", make_plan)
    save_pruned(model, tmp_path / "saved", plan)
    weights = load_file(tmp_path / "saved" / "model.safetensors")

    def changed(change):
        path = tmp_path / "saved" / "config.json"
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))
        return config_of(path.parent), weights

    return changed


def test_a_config_gives_the_shape_of_every_projection(unequal):
    config, weights = unequal
    layers = {name for name in weights if "vision" not in name}
    found = [PROJECTION.search(name) for name in sorted(layers)]
    found = [match for match in found if match]
    assert len([m for m in found if m[3] == "weight"]) == 7 * config.num_hidden_layers
    for match in found:
        rows, columns = expected_shape(config, int(match[1]), match[2])
        shape = (rows, columns) if match[3] == "weight" else (rows,)
        assert tuple(weights[match.string].shape) == shape, match.string
    text = [(name, weights[name]) for name in sorted(layers)]
    assert [name for name, _ in check_shapes(text, config)] == sorted(layers)
    assert is_pruned(config)


@pytest.mark.parametrize("name", GROUPED)
def test_a_dense_config_is_left_alone(name):
    config = tiny_config(name).get_text_config()
    assert not is_pruned(config)
    config.per_layer_config = {0: {"rms_norm_eps": 0.5}}
    assert not is_pruned(config)
    config.per_layer_config = {0: {"intermediate_size": 5}}
    assert is_pruned(config)


def test_equal_layers_are_ours_by_their_mark(saved):
    *_, folder = saved("qwen2", equal_plan)
    assert is_pruned(config_of(folder))


@pytest.mark.parametrize(
    "layer",
    [
        {"intermediate_size": 3},  # fewer than the weights: vLLM would read the first rows alone
        {"intermediate_size": 23},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ],
)
def test_a_config_that_lies_of_a_layer_is_refused(llama, layer):
    config, weights = llama(lambda fields: fields["per_layer_config"]["1"].update(layer))
    with pytest.raises(InputError, match=r"layers\.1\..*says \(.*\) for layer 1; copy"):
        list(check_shapes(weights.items(), config))


def test_a_layer_that_config_leaves_out_is_refused(llama):
    config, weights = llama(lambda fields: fields["per_layer_config"].pop("2"))
    with pytest.raises(InputError, match=r"layers\.2\..* for layer 2; copy"):
        list(check_shapes(weights.items(), config))
    config, weights = llama(lambda fields: fields.pop("per_layer_config"))
    with pytest.raises(InputError, match="for layer 0; copy"):
        list(check_shapes(weights.items(), config))


def test_a_layer_too_many_is_refused(llama):
    config, weights = llama(lambda fields: fields.update(num_hidden_layers=3))
    weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"layers\.3\.mlp.*config.json has 3 layers; copy"):
        list(check_shapes(weights.items(), config))


def test_packed_bytes_of_a_quantised_model_pass(llama):
    config, weights = llama(lambda fields: None)
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = weights[name].shape
    packed = [(name, torch.zeros(rows * columns // 2, 1, dtype=torch.uint8))]
    assert len(list(check_shapes(packed, config, quantised=True))) == 1
    one_byte_each = [(name, torch.zeros(rows - 1, columns, dtype=torch.int8))]
    told = [(f"{name}_shape", torch.tensor([rows, columns]))]
    assert len(list(check_shapes(told, config, quantised=True))) == 1
    wrongly_told = [(f"{name}_shape", torch.tensor([rows, columns + 1]))]
    for wrong, quantised in ((packed, False), (one_byte_each, True), (wrongly_told, True)):
        with pytest.raises(InputError, match="copy the folder again"):
            list(check_shapes(wrong, config, quantised))


def test_ranks_must_divide_every_layer(llama):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12}
    layers = {str(index): dict(sizes) for index in range(3)}
    config, _ = llama(lambda fields: fields.update(per_layer_config=layers))
    for ranks in (1, 2, 4):  # of four, two share each key/value head
        check_tensor_parallel(config, ranks)
    layers["1"]["intermediate_size"] = 10
    config, _ = llama(lambda fields: fields.update(per_layer_config=layers))
    check_tensor_parallel(config, 2)
    with pytest.raises(InputError, match="layer 1 has .*intermediate_size 10 .*use .* 1 or 2, or"):
        check_tensor_parallel(config, 4)
    layers["0"] |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    config, _ = llama(lambda fields: fields.update(per_layer_config=layers))
    with pytest.raises(InputError, match=r"layer 0 has .*heads 3.*\(1 such layers\); use .* 1, or"):
        check_tensor_parallel(config, 2)
