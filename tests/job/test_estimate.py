"""The stages that a job expects are those that its bars have, step by step."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from tiny import batches, tiny

from liar_ext import Recipe, prune
from liar_ext.job import pruning
from liar_ext.job.estimate import Estimate, by_blocks
from liar_ext.job.planning import Sweep
from liar_ext.system.progress import Bar, Timeline, showing_bars

SMALL = 16 * 24**2  # bytes: a group of sites for each


@pytest.fixture
def timelines(monkeypatch):
    """The timelines of the jobs that run, on a terminal."""
    made, init = [], Bar.__init__

    def note(*given):
        made.append(Timeline(*given))
        return made[-1]

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(pruning, "Timeline", note)
    monkeypatch.setattr(Bar, "__init__", lambda *a, **k: init(*a, **{**k, "file": terminal}))
    return made


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", {}),
        ("llama", {"schedule": "one-pass", "memory": SMALL}),
        ("llama", {"allocation": "uniform", "criterion": "taylor"}),
        ("llama", {"allocation": "uniform", "schedule": "one-pass", "damp": 0.01}),
        ("bert", {"memory": SMALL}),
        ("vit", {}),
        ("llama", {"keep_blocks": 0.67}),
    ],
)
def test_every_stage_makes_the_steps_that_are_expected(timelines, family, choices):
    model, recipe = tiny(family), Recipe(keep=0.5, tile=1, **choices)
    text = batches(model, 8)
    held_out = [each["input_ids"] for each in text[:2]] if family == "llama" else None
    prune(model, text, recipe, evaluate_on=held_out, progress=True)
    (job,) = timelines
    assert len(job.stages) > 1
    assert {name: each.done for name, each in job.stages.items()} == {
        name: each.steps for name, each in job.stages.items()
    }
    assert job.left() == 0 and job.begun == len(job.bars)


def test_what_a_bank_or_a_job_before_has_is_no_stage(timelines):
    model = tiny("llama")
    work = Sweep(model, batches(model, 8), probe_keep=0.8)
    with showing_bars(True):
        for keep in (0.6, 0.5):
            work.prune(Recipe(keep=keep, tile=1, schedule="one-pass"))
    first, second = timelines
    assert first.bars == ["curves", "reconstruct", "sensitivity", "reconstruct"]
    assert second.bars == ["reconstruct"]
    for job in timelines:
        assert job.begun == len(job.bars) and job.left() == 0


def test_a_quiet_job_counts_nothing(timelines):
    model = tiny("llama")
    prune(model, batches(model, 8), keep=0.5)
    assert timelines[0].stages == {}


def test_walks_over_blocks_have_the_work_of_all_stages():
    bars = [
        Estimate("calibrate", 3.0, 40, 8),
        Estimate("curves", 5.0, 50, 6),
        Estimate("sensitivity", 7.0, 40, 24),
        Estimate("reconstruct", 11.0, 60, 6),
    ]
    walk = Estimate("layerwise", 13.0, 70, 3)
    probes = Estimate("sensitivity", 0.0, 70, 24)
    first = Estimate("calibrate", 26.0, 70, 3)
    assert by_blocks([*bars, walk], 3, kept=False) == [first, probes, walk]
    first, probes = Estimate("calibrate", 15.0, 60, 3), replace(probes, bytes=60)
    memory = Estimate("from memory", 11.0, 60, 3)
    assert by_blocks(bars, 3, kept=True) == [first, probes, memory]
    second = Estimate("calibrate", 3.0 + 11.0, 60, 3)
    assert by_blocks(bars, 3, kept=False) == [first, probes, second]
    for few in ([], [Estimate("evaluate", 2.0, 0, 4)]):  # of a job that removes experts alone
        assert by_blocks(few, 3, kept=True) == few


@pytest.mark.parametrize("schedule", ["layerwise", "one-pass"])
def test_what_a_checkpoint_has_is_no_work(timelines, schedule, tmp_path):
    """Of a job that was done once, solves in one pass are left, which no checkpoint keeps.

    Of a walk the blocks are left that are past the streams that were written last.
    """
    for _ in range(2):
        model = tiny("llama")
        recipe = Recipe(keep=0.5, tile=1, schedule=schedule)
        prune(model, batches(model, 8), recipe, checkpoint=tmp_path / "kept", progress=True)
    stages = timelines[-1].stages
    left = {name: max(each.steps - each.spared, 0) for name, each in stages.items()}
    left.pop("layerwise", None)
    assert left.pop("reconstruct") == (6 if schedule == "one-pass" else 0)
    assert set(left.values()) == {0}
