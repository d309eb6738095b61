from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from covers import some
from seeing import SEEING, seeing_inputs, seeing_model
from tiny import same_weights, tiny

from liar_ext import prune
from liar_ext.calibration.taps import watched
from liar_ext.models.running import body_of
from liar_ext.reconstruction.streams import HiddenStates, features_once

SEQUENCES = 4


def pruned(name: str, **choices):
    """Return a pruned model that sees, and how often it ran its encoder."""
    model, runs = seeing_model(name), []
    data = [seeing_inputs(name, seed) for seed in range(SEQUENCES)]
    data = [{**each, "pixel_values": each["pixel_values"].float()} for each in data]
    with watched(model.get_encoder("image"), lambda *_: runs.append(1)):
        prune(model, data, keep=0.6, tile=1, **choices)
    return model, len(runs)


@some("name", SEEING, "llava", "qwen3_vl")
@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_images_are_encoded_once_with_the_same_result(name, schedule, monkeypatch):
    once, runs = pruned(name, schedule=schedule)
    assert SEQUENCES <= runs <= SEQUENCES + 3  # those of checks before the job
    monkeypatch.setattr("liar_ext.job.pruning.features_once", lambda *_: nullcontext())
    again, runs = pruned(name, schedule=schedule)
    assert runs > 2 * SEQUENCES
    assert same_weights(once, again)


def test_other_images_have_other_features_and_nothing_stays():
    model, states = seeing_model("qwen3_vl").double(), HiddenStates()
    first, second = (seeing_inputs("qwen3_vl", seed) for seed in (0, 1))
    with torch.no_grad():
        expected = model(**second).logits
        with features_once(model, states):
            model(**first)
            # Features of four image tokens, for the first block and between two blocks, alone.
            assert states.in_memory == 2 * 4 * 64 * 8
            for _ in range(2):
                assert torch.equal(model(**second).logits, expected)
    assert "get_image_features" not in vars(body_of(model))
    assert states.in_memory == 0


def test_a_method_that_others_put_there_is_given_back():
    model = seeing_model("llava")
    body = body_of(model)
    body.get_image_features = own = body.get_image_features
    with features_once(model, HiddenStates()), features_once(model, HiddenStates()):
        assert vars(body)["get_image_features"] is not own
    assert vars(body)["get_image_features"] is own


def test_an_encoder_that_is_pruned_runs_as_before():
    model = tiny("clip")
    with features_once(model, HiddenStates()):
        assert "get_image_features" not in vars(model)
