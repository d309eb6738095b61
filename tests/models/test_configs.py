"""What tells the config of one model from that of another, however they are loaded."""

from __future__ import annotations

import pytest
from tiny import batches, tiny

from liar_ext import load_model, load_pruned, prune, save_pruned
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.models.registry import config_digest


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bert", "clip", "mixtral", "opt"])
def test_a_config_is_the_same_however_it_is_loaded(name, tmp_path):
    model = tiny(name)
    digest = config_digest(model)
    model.save_pretrained(tmp_path)
    eager = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    loaded = [model, eager, *(load_model(tmp_path, dtype)[0] for dtype in ("float32", "bfloat16"))]
    loaded += [BlockStore(tmp_path).model] if name in ("llama", "mixtral", "opt") else []
    assert {config_digest(each) for each in loaded} == {digest}


def test_the_config_of_a_pruned_model_stays_the_same(tmp_path):
    model = tiny("llama")
    report = prune(model, batches(model), keep=0.6, preset="fast")
    save_pruned(model, tmp_path / "pruned", report.plan)
    loaded = [load_pruned(tmp_path / "pruned"), BlockStore(tmp_path / "pruned").model]
    assert {config_digest(each) for each in loaded} == {config_digest(model)}


@pytest.mark.parametrize("fields", [{"hidden_act": "relu"}, {"rms_norm_eps": 1e-4}])
def test_what_a_config_computes_with_tells_models_apart(fields):
    assert config_digest(tiny("llama")) != config_digest(tiny("llama", **fields))
