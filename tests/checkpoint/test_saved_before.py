"""A folder that version 0.1.0 saved, with layers of unequal sizes, still loads with its outputs."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import liar_ext

SAVED = Path(__file__).parents[1] / "assets" / "saved_by_0.1.0"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SAVED, tmp_path / "saved")


def test_it_verifies(folder):
    facts = liar_ext.verify_pruned(folder)
    assert facts["agrees"] and facts["layers"] == "unequal"
    assert len(facts["loaders"]) == 2


def test_the_loader_of_the_folder_finds_its_class(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ours = liar_ext.load_pruned(folder)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert type(model).__name__ == "LlamaForCausalLM"
