"""Benchmarks by a clock of the test's own: what is timed, in which order, and what comes out."""

from __future__ import annotations

import json
import math
import sys
from itertools import count

import pytest
import torch
from example_reports import ordinary, save
from tiny import CAUSAL, TINY, tiny

from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.measure import speed
from liar_ext.measure.speed import (
    Quartiles,
    Settings,
    benchmark,
    check_models,
    measure,
    peak_memory,
    run_once,
)
from liar_ext.report.reading import bench_file, read_bench
from liar_ext.system.environment import process_memory

SHORT = Settings(rounds=2, prompt_length=6, new_tokens=4, batches=(1, 3))


class Clock:
    """A clock that a step of a model moves on by its own seconds."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def watch(self, model, name: str, seconds):
        seconds = iter(seconds)

        def before(*_, **__):
            self.now += next(seconds)
            self.order.append(name)

        model.register_forward_pre_hook(before, with_kwargs=True)
        return model


def test_rates_are_medians_of_rounds_and_ratios_of_pairs():
    clock = Clock()
    steps = 1 + SHORT.new_tokens
    # Seconds of each pass: two batch sizes of a warm-up and two rounds. The warm-up is slow.
    per_run = [100, 2, 4, 100, 2, 4]
    dense = clock.watch(tiny("llama"), "dense", [s for s in per_run for _ in range(steps)])
    pruned = clock.watch(tiny("llama"), "pruned", [s / 2 for s in per_run for _ in range(steps)])
    rates = measure({"pruned": pruned, "dense": dense}, SHORT, clock=clock)
    assert [(rate.batch, rate.what, rate.unit) for rate in rates] == [
        (batch, what, unit)
        for batch in SHORT.batches
        for what, unit in (
            ("prefill", "tokens/s"),
            ("first token", "ms"),
            ("decode", "tokens/s"),
        )
    ]
    prefill, first, decode = rates[:3]
    assert prefill.dense == Quartiles.of([6 / 2, 6 / 4]) and prefill.pruned.median == 2 * 2.25
    assert first.dense == Quartiles.of([2000, 4000])
    assert decode.dense == Quartiles.of([4 / 8, 4 / 16])
    assert [rate.ratio.median for rate in rates[:3]] == [2, 0.5, 2]
    assert rates[5].dense == Quartiles.of([3 * 4 / 8, 3 * 4 / 16])  # three prompts at a time
    runs = clock.order[::steps]
    assert runs == ["dense", "pruned", "pruned", "dense", "dense", "pruned"] * 2


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_timed_by_what_it_does(name, recwarn):
    clock = count().__next__
    found = run_once(tiny(name), 2, SHORT, lambda: float(clock()))
    expected = {"prefill", "first token", "decode"} if name in CAUSAL else {"encode"}
    assert {what for what, _ in found} == expected
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert not [each for each in recwarn if "deprecated" in str(each.message)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
@torch.no_grad()
def test_decoding_is_greedy_and_uses_the_cache(name):
    """The tokens are those of ``generate``, and after the prompt they come one by one."""
    model, taken = tiny(name), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: taken.append(kwargs["input_ids"]), with_kwargs=True
    )
    run_once(model, 2, SHORT, lambda: float(len(taken)))
    assert [ids.shape[1] for ids in taken] == [6, 1, 1, 1, 1]
    ids = torch.cat(taken, 1)
    model._forward_pre_hooks.clear()
    whole = model.generate(ids[:, :6], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    greedy = model(input_ids=ids[:, :-1]).logits.argmax(-1)[:, 5:]
    assert torch.equal(greedy, ids[:, 6:])
    assert whole.shape == ids.shape


def test_models_that_do_different_things_are_refused():
    with pytest.raises(InputError, match="both models must do the same"):
        check_models({"pruned": tiny("llama"), "dense": tiny("bert")}, SHORT)
    with pytest.raises(InputError, match="64 positions, and prompt and new tokens take 65"):
        check_models({"pruned": tiny("llama")}, Settings(prompt_length=61, new_tokens=4))
    check_models({"pruned": tiny("bert")}, Settings(prompt_length=64, new_tokens=4))
    check_models({"pruned": tiny("vit")}, Settings(prompt_length=4096))


@pytest.mark.exhaustive
def test_memory_is_that_of_another_process(llama_folder, tmp_path, monkeypatch):
    """Whatever this process held before: its own peak is no start for the other's.

    Nor does the other run what lies in the current folder.
    """
    for name in ("json", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    block = torch.ones(100_000_000)  # 400 MB, and freed
    del block
    here = process_memory(peak=True)
    peaks = peak_memory(str(llama_folder), SHORT)
    assert list(peaks) == ["load", "1", "3"]
    assert 50 << 20 < peaks["load"] <= peaks["1"] <= peaks["3"]
    assert peaks["3"] < here
    with pytest.raises(InputError, match="positions"):
        peak_memory(str(llama_folder), Settings(prompt_length=1000))


def test_what_the_other_process_refuses_is_refused(monkeypatch):
    ending = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(speed, "child", lambda _: ending)
    with pytest.raises(InputError, match="it was killed, for lack of memory"):
        peak_memory("x", SHORT)
    ending[-1] = "raise SystemExit('a reason')"
    with pytest.raises(InputError, match="can't be measured: a reason; give smaller --batch"):
        peak_memory("x", SHORT)


def options(**more) -> list[str]:
    short = {"--rounds": 1, "--prompt-length": 6, "--new-tokens": 2, "--batch": 1}
    return [str(word) for pair in (short | more).items() for word in pair]


@pytest.fixture
def no_processes(monkeypatch):
    """Tell a memory of each model without starting a process for it."""
    monkeypatch.setattr(speed, "peak_memory", lambda *_: {"load": 5 << 20, "1": 7 << 20})


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A model folder with a report."""
    place = tmp_path / "pruned"
    save(place, ordinary(2))
    for path in llama_folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def test_the_command_prints_a_table_and_stores_it(folder, llama_folder, no_processes, capsys):
    words = ["bench", str(folder), "--against", str(llama_folder), "--threads", "1", "--quiet"]
    assert main([*words, *options()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["dense", "pruned", "pruned", "/", "dense", "(quartiles)"]
    for title in ("prefill", "first token", "decode", "parameters", "weights", "peak memory"):
        assert any(title in line for line in lines), title
    assert "threads 1" in lines[-2] and lines[-1] == f"{bench_file(folder)}: written"
    stored = read_bench(bench_file(folder))
    assert stored.dense.params == stored.pruned.params and len(stored.rates) == 3
    assert set(stored.pruned.peak) == {"load", "1"} and stored.settings["dtype"] == "float32"
    assert main(["report", str(folder)]) == 0  # which shows it
    assert "greedy decoding" in folder.with_name("pruned.html").read_text()


def test_numbers_go_where_they_are_wanted(folder, llama_folder, tmp_path, capsys):
    target = tmp_path / "x.json"
    words = ["bench", str(folder), "--against", str(llama_folder), "--out", str(target)]
    words += ["--no-memory", "--quiet", *options()]
    for _ in range(2):  # the second time over its own
        assert main(words) == 0
    assert not bench_file(folder).exists() and read_bench(target).pruned.peak == {}
    target.write_text("{}")
    assert main(words) == 2
    assert "exists and liar bench didn't write it" in capsys.readouterr().err
    assert target.read_text() == "{}"


def test_what_can_not_be_measured_is_refused(folder, no_processes, capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure", None)
    words = ["bench", str(folder), "--against", str(folder)]
    for more, said in (
        (["--out", str(folder / "no" / "x.json")], "there is no folder"),
        (["--batch", "0"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--prompt-length", "4096"], "positions"),
        (["--device", "cuda:9"], "device must be one"),
        (["--dtype", "int3"], "--dtype must be one of"),
    ):
        try:
            assert main([*words, *more]) == 2
        except SystemExit as end:
            assert end.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", str(folder)])
    assert "--against" in capsys.readouterr().err


def test_a_benchmark_says_how_and_where_it_was_measured(folder):
    found = benchmark(folder, folder, Settings(1, 6, 2, (1,)), memory=False)
    fields = json.loads(found.to_json())
    assert fields["version"] == 1
    assert fields["settings"]["threads"] == torch.get_num_threads()
    assert {"cpu", "torch", "transformers", "liar_ext"} <= set(fields["machine"])
