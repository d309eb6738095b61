"""The whole job with a smaller hidden size: how many features stay, in how many passes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from covers import some
from test_narrowing import narrowed
from tiny import batches, outputs, tiny

from liar_ext import Budget, InputError, narrow, prune
from liar_ext.models.residual_stream import hidden_of
from liar_ext.reconstruction import hidden_size


@pytest.mark.parametrize(
    ("keep", "tile", "count"), [(0.9, 1, 32), (0.8, "auto", 32), (0.79, 1, 24), (0.5, 16, 16)]
)
def test_the_count_is_a_multiple_at_most_the_fraction(keep, tile, count):
    model = tiny("llama")  # 40 features, 8 heads
    assert hidden_size.count_kept(hidden_of(model), keep, tile) == count


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.1, float("nan"), 0.1])
def test_fractions_that_leave_nothing_or_make_no_sense(keep):
    with pytest.raises(InputError, match="hidden( must|: )"):
        prune(tiny("llama"), iter(()), keep_hidden=keep)


@some("name", ["llama", "bert"], "llama")
@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 1.0},
        {"keep": 0.7},
        {"keep": 0.7, "reconstruct": "affine", "allocation": "uniform"},
        {"keep": 0.7, "schedule": "layerwise", "criterion": "taylor", "allocation": "global"},
        {"keep": Budget(0.7, of="params", tile=2)},
    ],
)
def test_the_whole_job(name, settings):
    model = tiny(name)
    before = sum(p.numel() for p in model.parameters())
    data = batches(model)
    if "criterion" in settings and name == "bert":
        data = [{**batch, "labels": torch.arange(8) % 2} for batch in data]
    report = prune(model, iter(data), keep_hidden=0.8, **settings)
    hidden = {"llama": 32, "bert": 24}[name]
    assert len(report.plan.hidden.kept) == hidden and model.config.liar["history"]
    assert bool(report.sites) == (settings["keep"] != 1.0)
    assert report.params["before"] == before
    assert report.params["after"] == sum(p.numel() for p in model.parameters())
    assert report.params["prunable_after"] < report.params["prunable_before"]
    assert all(row.units_after == hidden for row in report.hidden)
    assert "## Hidden features" in report.to_markdown()
    assert report.recipe.keep_hidden == 0.8 and report.settings["calibration_sequences"] == 48
    assert report.settings["narrow_passes"] == 2
    assert torch.isfinite(outputs(model)).all()


def test_sites_are_solved_on_the_narrow_model():
    """The same as narrowing first and pruning what comes out, as if it were a dense model."""
    together, one_by_one = tiny("mistral"), tiny("mistral")
    data = batches(together)
    settings = {"allocation": "uniform", "criterion": "wifv"}
    report = prune(together, data, Budget(0.7), keep_hidden=0.8, **settings)
    small, _ = narrowed(one_by_one, data, 0.8)
    small.config.hidden_size = 32
    alone = prune(small, data, Budget(0.7), schedule="layerwise", **settings)
    assert report.plan.sites == alone.plan.sites
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor)


def test_a_family_without_a_stream_is_refused_before_the_first_batch():
    def no_batch():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(InputError, match="no stream for family 'nanochat'"):
        prune(tiny("nanochat"), no_batch(), keep_hidden=0.8)


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
