"""Bars: what a terminal shows of a job, and that nothing else is written."""

from __future__ import annotations

import gc
import io
import logging
import sys
import threading
import time

import forked
import pytest
from tqdm import auto, tqdm

from liar_ext.system.progress import (
    Bar,
    Stage,
    Timeline,
    hiding_bars,
    plain_lines,
    showing_bars,
    spare,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr("liar_ext.system.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_says_what_is_done_and_what_is_left(clock):
    """Half of the work is done after 250 seconds, so that as many are left."""
    stages = {"calibrate": Stage(10, 30.0), "sensitivity": Stage(60, 40.0)}
    job = Timeline(stages, clock=lambda: clock[0])
    assert job.line("[1/2]", "calibrate", 0, 10) == (
        "[1/2] collecting activation statistics 0/10 · 0:00 elapsed"
    )
    job.advance("calibrate, pass 1", 10)
    clock[0] += 250
    said = "[2/2] measuring sensitivity 30/60 · 4:10 elapsed, about 1:40 remaining"
    assert job.left("sensitivity", 30) == pytest.approx(100.0)  # 250 s · 20 / 50
    assert job.line("[2/2]", "sensitivity", 30, 60) == said
    clock[0] += 3600
    said = job.line("[2/2]", "sensitivity", 60, 60)
    assert said.endswith("1:04:10 elapsed, about 0:00 remaining")
    said = "prune generating text 3 · 1:04:10 elapsed, about 1:25:33 remaining"
    assert job.line("prune", "write", 3, None) == said
    said = "[2/2] collecting activation statistics, pass 2 3/10"
    assert job.line("[2/2]", "calibrate, pass 2", 3, 10).startswith(said)


def test_each_bar_of_a_job_has_a_number_of_its_own():
    """Also the second of a stage; what a checkpoint has leaves its number out."""
    stages = {name: Stage(4, 1.0) for name in ("calibrate", "curves", "reconstruct")}
    order = ["calibrate", "reconstruct", "curves", "reconstruct"]
    whole, resumed = (Timeline(stages, order) for _ in range(2))
    assert [whole.begin(each) for each in order] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert resumed.begin("calibrate, pass 1") == "[1/4]" and resumed.begin("curves") == "[3/4]"
    assert resumed.begin("write") == "prune" and resumed.begin("reconstruct") == "[4/4]"
    assert resumed.begin("calibrate") == "prune"  # nobody expected another


def test_what_was_done_before_a_stop_takes_no_time(clock):
    stages = {"calibrate": Stage(10, 30.0), "curves": Stage(4, 10.0), "layerwise": Stage(6, 60.0)}
    job = Timeline(stages, clock=lambda: clock[0])
    with job.shown():
        spare("curves")
        spare("calibrate, pass 1", 10)
        spare("layerwise", 0)
    job.advance("calibrate, pass 1", 10)
    job.advance("curves", 4)
    assert job.left() is None  # nothing was done in this process yet
    clock[0] += 10
    assert job.left("layerwise", 1) == pytest.approx(50.0)
    with job.shown():
        spare("layerwise", 2)
    assert job.left("layerwise", 3) == pytest.approx(30.0)
    spare("layerwise")  # outside of a job it is nothing


@pytest.fixture(autouse=True)
def shown():
    with showing_bars(True):
        yield


def test_a_job_has_one_line_on_a_terminal_that_is_gone_at_the_end():
    out = Terminal()
    job = Timeline({"curves": Stage(4, 1.0), "probes": Stage(4, 3.0)})
    settings = {"file": out, "mininterval": 0}
    with job.shown():
        assert list(Bar(range(4), desc="curves", **settings)) == [0, 1, 2, 3]
        with Bar(total=4, desc="probes", **settings) as bar:
            bar.update(2)
            assert job.left("probes", 2) is not None
    assert [stage.done for stage in job.stages.values()] == [4, 2]
    written = out.getvalue()
    assert "[1/2] computing error curves 4/4 · 0:00 elapsed, about 0:00 remaining" in written
    assert "[2/2] probes 2/4" in written and "\n" not in written
    assert not written.rpartition("\r")[0].rpartition("\r")[2].strip()  # wiped out


def test_outside_of_a_job_a_bar_is_that_of_tqdm():
    out = Terminal()
    list(Bar(range(4), desc="evaluate", file=out))
    assert "evaluate: 100%" in out.getvalue() and out.getvalue().endswith("\n")


def test_a_bar_that_is_interrupted_in_its_making_goes_without_a_word(monkeypatch):
    """Python would print what is raised where an object is deleted."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "__init__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Bar(range(3))
    gc.collect()
    assert not said


def test_where_there_is_no_terminal_nothing_is_written():
    out = io.StringIO()
    job = Timeline({"curves": Stage(4, 1.0)})
    with job.shown():
        assert list(Bar(range(4), desc="curves", file=out)) == [0, 1, 2, 3]
        with hiding_bars():
            assert list(Bar(range(4), desc="curves", file=Terminal())) == [0, 1, 2, 3]
    assert out.getvalue() == "" and job.stages["curves"].done == 4


@pytest.mark.parametrize("plain", [True, False])
def test_without_a_terminal_the_log_has_a_line_every_30_seconds(plain, clock, caplog):
    """Also on a terminal, if it is asked for."""
    caplog.set_level(logging.INFO, "liar_ext")
    out = Terminal() if plain else io.StringIO()
    stages = {"curves": Stage(4, 1.0), "probes": Stage(4, 3.0)}
    job = Timeline(stages, clock=lambda: clock[0])
    with job.shown(), plain_lines(plain):
        for _ in Bar(range(4), desc="curves", file=out):
            clock[0] += 10
        with Bar(total=4, desc="probes", file=out) as bar:
            for _ in range(4):
                clock[0] += 8
                bar.update()
    with plain_lines(plain):
        for _ in Bar(range(4), desc="evaluate", file=out):
            clock[0] += 20
    assert caplog.messages == [
        "[1/2] computing error curves 3/4 · 0:30 elapsed, about 2:10 remaining",
        "[2/2] probes 3/4 · 1:04 elapsed, about 0:14 remaining",
        "evaluating 2/4",
        "evaluating 4/4",
    ]
    assert out.getvalue() == ""


def test_a_fork_of_the_tests_shares_no_lock_of_bars():
    """One that was killed while it held it let all others wait for ever."""
    with Bar(total=1) as bar:
        before = bar.get_lock()
    for kind in (Bar, tqdm, auto.tqdm):
        assert forked.end(forked.fork(lambda kind=kind: int(kind.get_lock() is before))) == 0


def test_a_step_that_takes_long_has_its_lines_too(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "liar_ext")
    monkeypatch.setattr("liar_ext.system.progress.EVERY", 0.2)
    before = threading.active_count()
    with Bar(total=4, desc="curves", file=io.StringIO()) as bar:
        bar.update()
        time.sleep(1.0)  # one step
        assert caplog.messages.count("computing error curves 1/4") >= 2
    said = len(caplog.messages)
    time.sleep(0.5)
    assert len(caplog.messages) == said and threading.active_count() == before
