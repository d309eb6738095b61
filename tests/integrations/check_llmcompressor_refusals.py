"""Modifiers in llm-compressor itself: recipes that are refused, and what is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from compressing import EQUAL, W4, load, loader, logits, rows, run
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

from liar_ext import InputError
from liar_ext.integrations.llmcompressor import LIARGPTQModifier, LIARPruningModifier


def groups_of(size):
    groups = copy.deepcopy(W4["config_groups"])
    groups["group_0"]["weights"]["group_size"] = size
    return groups


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kep": 0.8}, "did you mean keep"),
        ({"keep": 1.8}, r"keep must be in \(0, 1\]"),
        ({"keep": "half"}, "keep must be a number such as 0.5"),
        ({"criterion": "magic"}, "magic"),
        ({"samples": 8}, "samples is of the model or the data"),
        (
            {"self_text": 0.5, "random_tokens": 0.0},
            "self_text is of the .* leave it out",
        ),
        ({"preset": "fastest"}, "preset must be one of"),
        ({"kinds": "mlp"}, "kinds must be a list of some of"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LIARPruningModifier(**fields)


def test_a_wrong_field_in_yaml_is_named(folder):
    recipe = "s_stage:\n  s_modifiers:\n    LIARPruningModifier:\n      kep: 0.8\n"
    with pytest.raises(ValueError, match="did you mean keep"):
        oneshot(model=load(folder), recipe=recipe, dataset=loader())


def test_no_dataset(folder):
    with pytest.raises(InputError, match="has no calibration data"):
        oneshot(model=load(folder), recipe=[LIARPruningModifier()])


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setattr("liar_ext.integrations.llmcompressor.is_distributed", lambda: True)
    with pytest.raises(InputError, match="in one process"):
        run(folder, LIARPruningModifier(**EQUAL))


def test_shared_grams_need_pruning_before(folder):
    with pytest.raises(InputError, match="before it in the recipe"):
        run(folder, LIARGPTQModifier(**W4))
    with pytest.raises(InputError, match="before it in the recipe"):
        run(folder, LIARGPTQModifier(**W4), LIARPruningModifier(**EQUAL))


def test_shared_grams_of_a_layer_outside_of_the_blocks(folder):
    with pytest.raises(InputError, match="lm_head"):
        run(folder, LIARPruningModifier(**EQUAL), LIARGPTQModifier(**{**W4, "ignore": []}))


def test_shared_grams_and_a_smaller_hidden_size(folder):
    with pytest.raises(InputError, match="keep_hidden"):
        run(folder, LIARPruningModifier(**EQUAL, keep_hidden=0.5), LIARGPTQModifier(**W4))


def test_sizes_that_groups_do_not_divide_are_refused_before_calibration(folder):
    touched = DataLoader(rows(), collate_fn=lambda _: pytest.fail("calibrated"))
    for multiple in (1, 16):
        modifiers = LIARPruningModifier(tile=multiple), QuantizationModifier(**W4)
        with pytest.raises(InputError, match="set tile=32"):
            run(folder, *modifiers, dataset=touched)


def test_heads_that_groups_do_not_divide_are_refused(folder):
    others = "re:.*(q|k|v|gate|up|down)_proj"
    quantiser = QuantizationModifier(config_groups=groups_of(128), ignore=["lm_head", others])
    with pytest.raises(InputError, match=r"o_proj reads 64 features, which groups of 128"):
        run(folder, LIARPruningModifier(keep=0.5, kinds=["attn"]), quantiser)


def test_a_failure_leaves_the_model_and_no_session_behind(folder):
    model = load(folder)
    before = logits(model)
    with pytest.raises(InputError):
        oneshot(model=model, recipe=[LIARPruningModifier(keep=1e-9)], dataset=loader())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    run(folder, LIARPruningModifier(**EQUAL))
    assert active_session().lifecycle.finalized
