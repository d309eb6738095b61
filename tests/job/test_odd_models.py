"""Odd models and arguments of another kind are refused; what is around a job changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import batches, outputs, tiny
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masks

from liar_ext import (
    InputError,
    Recipe,
    calibrate,
    heal,
    prune,
    save_pruned,
    sweep,
    verify_pruned,
)
from liar_ext.calibration.texts import calibration_sequences
from liar_ext.checkpoint.loading import load_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 24}


def with_adapter(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["down_proj"])).base_model.model


def with_mask(model: nn.Module) -> nn.Module:
    masks.random_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.5)
    return model


def with_norm(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    return model


def with_norm_at_the_head(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.lm_head)
    return model


def with_a_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("scale", torch.ones(1))
    return model


def with_one_mlp(model: nn.Module) -> nn.Module:
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def in_int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})


MERGE = "is made of other parameters, as of an adapter, a parametrization or a mask; merge"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_adapter, MERGE),
        (with_mask, MERGE),
        (with_norm, MERGE),
        (with_norm_at_the_head, "changed by more than .*lm_head.param.*; remove"),
        (with_a_buffer, "changed by more than .*scale.*; remove"),
        (with_one_mlp, r"layers.2.mlp.* and .*layers.0.mlp.* are one module"),
        (in_int8, "must be a linear layer with floating-point weights, got Linear"),
    ],
)
def test_models_that_can_not_be_sliced_are_refused(change, said):
    model = change(tiny("llama"))
    before = outputs(model)
    with pytest.raises(InputError, match=said):
        prune(model, batches(tiny("llama"), 2), keep=0.6, preset="fast")
    assert torch.equal(outputs(model), before)


def test_a_head_for_answers_goes_through_a_whole_job(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=61, initializer_range=0.3, **SMALL)
    model = transformers.BertForQuestionAnswering(config)
    dense, data = copy.deepcopy(model.eval()), batches(tiny("bert"), 3)
    data[0]["attention_mask"][0, 5:] = 0
    report = prune(model, data, keep=0.6, tile=1, certify_on=data[:1])
    assert report.evaluation["certified"]["divergence"] > 0
    save_pruned(model, tmp_path / "pruned", report=report)
    assert verify_pruned(tmp_path / "pruned")["agrees"]
    found = heal(model, dense, data, held_out=data, budget={"steps": 30}, lr=1e-2)
    assert found["after"] < found["before"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: load_model(3), "must be a folder, a hub id or a GGUF file, got 3"),
        (lambda: load_model("m", dtype="float3"), "dtype must be one of torch, .*, got 'float3'"),
        (lambda: calibration_sequences([["a"]], None), "needs the tokenizer of the model, got"),
        (lambda: save_pruned("m", "o"), "needs the pruned model first, got str"),
        (lambda: calibrate("m", []), "needs a loaded model, got str"),
        (lambda: prune(tiny("llama"), bank="b.safetensors"), "must be a MomentBank, got str"),
        (lambda: sweep(tiny("llama"), bank="b"), "must be a MomentBank, got str"),
        (
            lambda: sweep(tiny("llama"), [], keep=None),
            "keep must be a number such as 0.5, got None",
        ),
        (lambda: Recipe.build(None, sites="atn"), "sites must be all, attn, mlp, .*, got 'atn'"),
    ],
)
def test_arguments_of_another_kind_are_named(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_one_budget_is_a_sweep_too():
    model = tiny("llama")
    (point,) = sweep(model, batches(model, 2), keep=0.9, preset="fast")
    assert point.plan.sites


@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_autocast_around_a_job_changes_nothing(schedule):
    plain, cast = tiny("llama"), tiny("llama")
    prune(plain, batches(plain), keep=0.6, schedule=schedule)
    with torch.autocast("cpu", torch.bfloat16):
        prune(cast, batches(cast), keep=0.6, schedule=schedule)
    for name, expected in plain.state_dict().items():
        assert torch.equal(cast.state_dict()[name], expected), name
