"""A folder that version 0.1.0 saved, with layers of unequal sizes, still loads with its outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import liar_ext
from liar_ext.checkpoint import load_model

SAVED = Path(__file__).parents[1] / "assets" / "saved_by_0.1.0"


@pytest.mark.parametrize("load", [liar_ext.load_pruned, lambda folder: load_model(folder)[0]])
def test_it_loads_with_the_outputs_that_it_was_saved_with(load, tmp_path):
    model = load(shutil.copytree(SAVED, tmp_path / "saved"))
    with safe_open(SAVED / "liar_probe.safetensors", "pt") as file:
        ids, logits = file.get_tensor("input"), file.get_tensor("output")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
    assert len(model.liar_plan.sites["1.mlp"].kept) == 1


def test_what_else_it_lacks_is_said():
    with pytest.raises(liar_ext.InputError, match="saved by version 0.1.0, which can only be load"):
        liar_ext.verify_pruned(SAVED)
