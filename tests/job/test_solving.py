"""The schedule auto: what is kept is what the whole model gives on text that nothing else saw."""

from __future__ import annotations

import copy

import pytest
import torch
from covers import some
from tiny import same_weights, tiny, tiny_inputs

from liar_ext import Recipe, prune
from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.divergence import Divergence
from liar_ext.job import solving
from liar_ext.job.solving import hold_out, sequences_to_judge


def batches(model, count, first=0):
    data = [tiny_inputs(model, batch=4, seed=first + seed) for seed in range(count)]
    return [{**batch, "fold": torch.tensor([at % 2] * 4)} for at, batch in enumerate(data)]


@some("name", ["llama", "bert", "mpnet", "gemma3_text"], "llama", "bert")
def test_auto_keeps_the_schedule_that_diverges_less(name):
    model = tiny(name)
    data, judge = batches(model, 2), batches(model, 2, first=50)
    alone, found = {}, {}
    for schedule in ("one-pass", "layerwise"):
        alone[schedule] = copy.deepcopy(model)
        prune(alone[schedule], data, keep=0.6, schedule=schedule)
        found[schedule] = Divergence(model, judge).of(alone[schedule])["divergence"]
    report = prune(model, data, keep=0.6, judge_on=judge)
    assert report.settings["schedules"] == pytest.approx(found, rel=1e-4)
    best = min(found, key=found.get)
    assert report.settings["schedule"] == best
    assert same_weights(model, alone[best])
    said = "in one pass" if best == "one-pass" else "layer by layer"
    assert f" {said}; divergence on held-out text: {found['one-pass']:.3g} in" in report.summary()
    assert not any("held-out" in each for each in report.warnings)
    assert report.recipe.schedule == "auto"  # by which the same comes out again


@pytest.mark.parametrize("wins", ["one-pass", "layerwise", "tie", "nan"])
def test_the_measurement_decides_and_nothing_else(wins, monkeypatch):
    model = tiny("llama")
    data, judge = batches(model, 2), batches(model, 1, first=50)
    said = {
        "one-pass": [1.0, 2.0],
        "layerwise": [2.0, 1.0],
        "tie": [1.0, 1.0],
        "nan": [float("nan"), 1.0],
    }[wins]
    values = iter(said)
    monkeypatch.setattr(Divergence, "of", lambda self, pruned: {"divergence": next(values)})
    report = prune(model, data, keep=0.6, judge_on=judge)
    expected = {"tie": "one-pass", "nan": "layerwise"}.get(wins, wins)
    assert report.settings["schedule"] == expected
    other = tiny("llama")
    prune(other, data, keep=0.6, schedule=expected)
    assert same_weights(model, other)


def test_no_solve_and_no_sensitivity_sees_what_decides():
    model = tiny("llama")
    data = [{**batch, "fold": torch.tensor([0, 1, 0, 1])} for batch in batches(model, 8)]
    report = prune(copy.deepcopy(model), data, keep=0.6)
    assert "schedules" in report.settings
    assert report.settings["calibration_sequences"] == 28
    rest, judged = hold_out(read_batches(data))
    kept, apart = (
        {tuple(row.tolist()) for batch in part for row in batch.inputs["input_ids"]}
        for part in (rest, judged)
    )
    assert len(apart) == 4 and not kept & apart
    assert sum(int(batch.fold.sum()) for batch in judged) == 2  # of each fold as many
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    prune(one, data, keep=0.6)
    prune(other, rest, keep=0.6, judge_on=[batch.inputs for batch in judged])
    assert same_weights(one, other)


@pytest.mark.parametrize("name", ["llama", "mpnet"])
def test_a_smaller_hidden_size_is_not_measured(name):
    model = tiny(name)
    report = prune(model, batches(model, 9), keep=0.6, keep_hidden=0.75)
    assert report.settings["schedule"] == "layerwise" and "schedules" not in report.settings
    assert report.settings["calibration_sequences"] == 36


def test_few_sequences_are_not_divided():
    model = tiny("llama")
    data = batches(model, 7)
    assert hold_out(read_batches(data))[1] == []
    report = prune(model, data, keep=0.6)
    assert report.settings["schedule"] == "layerwise" and "schedules" not in report.settings


def test_generated_sequences_do_not_decide():
    model = tiny("llama")
    data = [{**batch, "source": torch.tensor([0, 0, -1, -1])} for batch in batches(model, 20)]
    _, judged = hold_out(read_batches(data))
    assert sum(map(len, judged)) == 5
    assert all(bool((batch.source == 0).all()) for batch in judged)


def test_a_named_schedule_costs_no_measurement(monkeypatch):
    monkeypatch.setattr(solving, "divergence_of", None)
    for given in ({}, {"judge_on": batches(tiny("llama"), 1, first=50)}):
        model = tiny("llama")
        report = prune(model, batches(model, 9), keep=0.6, schedule="layerwise", **given)
        assert report.settings["calibration_sequences"] == 36


@pytest.mark.parametrize(
    "choices, count",
    [
        ({}, 16),
        ({"samples": 32}, 4),
        ({"samples": 8}, 2),
        ({"schedule": "one-pass"}, 0),
        ({"reconstruct": "none"}, 0),
    ],
)
def test_the_command_draws_sequences_only_where_they_decide(choices, count):
    assert sequences_to_judge(Recipe(**choices)) == count


def test_a_stopped_job_decides_the_same(tmp_path, monkeypatch):
    model = tiny("llama")
    data, judge = batches(model, 4), batches(model, 1, first=50)
    whole = copy.deepcopy(model)
    prune(whole, data, keep=0.6, judge_on=judge)
    stopped = copy.deepcopy(model)
    with monkeypatch.context() as broken:
        broken.setattr(solving, "divergence_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(stopped, data, keep=0.6, judge_on=judge, checkpoint=tmp_path / "c")
    prune(stopped, data, keep=0.6, judge_on=judge, checkpoint=tmp_path / "c")
    assert same_weights(whole, stopped)
