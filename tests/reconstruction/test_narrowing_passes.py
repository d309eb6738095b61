"""Norms whose sums do not fit the memory together are taken in groups, a pass each."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from tiny import batches, tiny

from liar_ext import narrow
from liar_ext.models.residual_stream import hidden_of
from liar_ext.reconstruction import hidden_size

KEPT = {"llama": 32, "bert": 24}


def bytes_of_one(model) -> int:
    """Return what the sums of one norm take: both folds in float64."""
    size = hidden_of(model).size
    return 16 * (KEPT[model.config.model_type] + size) ** 2


@pytest.mark.parametrize("norms", [0, 1, 2.9, 5])
@pytest.mark.parametrize("name", KEPT)
def test_the_result_is_the_same_bit_for_bit(name, norms):
    """A tiny llama has 7 norms; bert 7, with one more for the first token, and a classifier."""
    model = tiny(name)
    data = batches(model)
    whole = narrow(model, data, 0.8)
    parts = narrow(model, data, 0.8, memory=int(norms * bytes_of_one(model)))
    at_once = max(1, int(norms))
    groups = -(-len(hidden_of(model).sources) // at_once)
    assert (whole.source.pop("passes"), parts.source.pop("passes")) == (2, 1 + groups)
    assert parts.kept == whole.kept and parts.source == whole.source
    assert parts.weights.keys() == whole.weights.keys()
    for path, pair in whole.weights.items():
        for ours, theirs in zip(parts.weights[path], pair, strict=True):
            assert torch.equal(ours, theirs) if theirs is not None else ours is None, path
            assert theirs is None or ours.dtype == model.dtype
    for ours, theirs in zip(parts.rows, whole.rows, strict=True):
        assert replace(ours, seconds=0.0) == replace(theirs, seconds=0.0)


@pytest.mark.parametrize("norms", [1, 3])
@pytest.mark.parametrize("name", KEPT)
def test_the_sums_of_a_pass_are_within_the_memory(name, norms, watch_sums):
    model = tiny(name)
    memory = norms * bytes_of_one(model)
    held = watch_sums(hidden_size)
    narrow(model, batches(model), 0.8, memory=memory)
    assert held[0] == 0 and held[1] == memory
    assert all(0 < here <= memory for here in held[1:])


def test_the_progress_counts_the_passes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # where progress is shown at all
    model = tiny("llama")
    narrow(model, batches(model), 0.8, memory=4 * bytes_of_one(model), progress=True)
    shown = capsys.readouterr().err
    for number in (1, 2, 3):
        assert f"narrow, pass {number} of 3" in shown
