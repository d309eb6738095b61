"""What is said of vLLM; nothing is written."""

from __future__ import annotations

import pytest
from folders import equal_plan, make_plan, pruned
from tiny import tiny

from liar_ext import InputError, save_pruned
from liar_ext.checkpoint.folder import strangers
from liar_ext.export import export
from liar_ext.export.vllm import SERVED


def saved(name, plan_of, folder, **settings):
    model, plan = pruned(name, plan_of, **settings)
    save_pruned(model, folder, plan)
    return folder


def test_equal_layers_need_nothing(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    for folder in (tmp_path / "dense", saved("llama", equal_plan, tmp_path / "equal")):
        done = export(folder, "vllm")
        assert done.paths == () and done.bytes == 0
        assert done.notes == (f"Nothing to write for equal layers: vllm serve {folder}.",)
    assert strangers(tmp_path / "equal") == []


@pytest.mark.parametrize("name", SERVED)
def test_unequal_layers_of_a_llama_like_model(name, tmp_path):
    folder = saved(name, make_plan, tmp_path / "model", bias=True)
    assert "the plug-in of liar_ext builds the unequal layers" in export(folder, "vllm").notes[0]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_others_are_refused(name, tmp_path):
    folder = saved(name, make_plan, tmp_path / "model")
    with pytest.raises(InputError, match="not for .*; prune with --uniform-layers"):
        export(folder, "vllm")
