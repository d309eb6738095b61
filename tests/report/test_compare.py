"""The page of several runs, and the benchmarks it reads."""

from __future__ import annotations

import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from example_reports import NASTY, SCRIPT, bench_of, ordinary, save, store_bench
from test_html import Reader

from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.measure.speed import Benchmark, ModelFacts, Quartiles, Rate
from liar_ext.report import sections
from liar_ext.report.page import (
    cautions,
    quality_points,
    read_runs,
    speed_of,
    speed_points,
    write_comparison,
)
from liar_ext.report.pictures import Point, drawing, scatter
from liar_ext.report.reading import read_bench


@pytest.fixture
def runs(tmp_path):
    """Three runs of one model; the last has no benchmark."""
    folders = [save(tmp_path / f"keep-{keep}", ordinary(4, keep)) for keep in (0.5, 0.7, 0.9)]
    for folder, speed in zip(folders[:2], (1.5, 1.2), strict=True):
        store_bench(folder, speed=speed)
    return folders


def page(folders, tmp_path: Path) -> Reader:
    return Reader(write_comparison(folders, tmp_path / "compare.html")[0].read_text())


def test_runs_stand_side_by_side(runs, tmp_path):
    found = page(runs, tmp_path)
    said = found.text.replace("\u00a0", " ")
    for told in ("keep-0.5", "keep-0.9", "81.43 M (60.5%)", "203.42 (× 7.389)", "30 (× 1.500)"):
        assert told in said
    assert "script" not in found.tags and "don't compare" not in said
    assert len(re.findall("<svg", (tmp_path / "compare.html").read_text())) == 2


def test_a_measure_that_is_zero_for_the_dense_model_has_no_ratio(tmp_path):
    dense, pruned = {"divergence": 0.0, "agreement": 1.0}, {"divergence": 0.125, "agreement": 0.75}
    encoder = ordinary(4, evaluation={"dense": dense, "pruned": pruned})
    said = page([save(tmp_path / "encoder", encoder)], tmp_path).text
    assert "0.125" in said and "()" not in said


def test_numbers_are_drawn_against_parameters(runs):
    found, notes = read_runs(runs)
    assert notes == [] and [run.number for run in found] == [1, 2, 3]
    points = quality_points(found, "perplexity")
    pruned = [(each.params, each.number) for each in points if each.number]
    assert pruned == [(81430848, 1), (102664512, 2), (123898176, 3)]
    assert [each.value for each in points if each.number is None] == [27.53]  # dense, once
    assert speed_of(found) == ("decode", 1)
    speeds = [(each.number, each.value) for each in speed_points(found, ("decode", 1))]
    assert speeds == [(1, 30.0), (None, 20.0), (2, 24.0), (None, 20.0)]


def test_points_lie_where_their_numbers_say():
    points = [Point(100_000_000, 40.0, "a", 1), Point(130_000_000, 30.0, "a")]
    points += [Point(101_000_000, 40.5, "a", 2), Point(50_000_000, 300.0, "b", 3)]
    with drawing("compare") as figures:
        (panel,) = scatter(figures, points, "perplexity").axes
        drawn = [line.get_xydata().tolist() for line in panel.lines]
        assert drawn == [[[100, 40]], [[130, 30]], [[101, 40.5]], [[50, 300]]]
        assert [text.get_text() for text in panel.texts] == ["1, 2", "3"]
        assert panel.get_yscale() == "linear"
        (panel,) = scatter(figures, [*points, Point(1, 9000.0, "b", 4)], "perplexity").axes
        assert panel.get_yscale() == "log"
        assert scatter(figures, [points[1]], "perplexity") is None


def test_runs_of_different_models_and_text_are_told_of(runs, tmp_path):
    other = ordinary(4, model=NASTY)
    other["evaluation"]["pruned"]["seq_len"] = 128
    folders = [*runs, save(tmp_path / "other", other), save(tmp_path / "empty", {})]
    said = page(folders, tmp_path).text
    assert "runs of 3 different models: " in said and SCRIPT in said
    assert "an unnamed model" in said and "windows of different length" in said


def test_speeds_under_other_conditions_are_told_of(runs):
    store_bench(runs[1], settings={"threads": 8, "dtype": "float32"})
    found, notes = read_runs(runs)
    assert notes == cautions(found)
    assert notes == ["Speeds were measured with different threads (1, 8), and don't compare."]


def test_a_machine_that_was_busier_is_told_of(runs):
    bench = bench_of(runs[1])
    slower = [
        replace(rate, dense=Quartiles(*(0.8 * value for value in astuple(rate.dense))))
        for rate in bench.rates
    ]
    store_bench(runs[1], rates=slower)
    _, notes = read_runs(runs)
    assert len(notes) == 1 and "itself was 1.25 times as fast in one measurement" in notes[0]


def test_runs_of_one_name_go_by_their_paths(tmp_path):
    folders = [save(tmp_path / each / "run", ordinary(2)) for each in "ab"]
    found, _ = read_runs(folders)
    assert [run.name for run in found] == [str(folder) for folder in folders]


def test_a_stale_benchmark_is_told_of(runs):
    save(runs[0], ordinary(4, 0.6))
    found, notes = read_runs(runs)
    assert found[0].bench is None and "another state of this folder" in notes[0]


def test_the_command_writes_page_and_pictures(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *map(str, runs), "--png", "pictures"]) == 0
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == [
        "perplexity.png",
        "speed.png",
    ]
    assert (tmp_path / "compare.html").exists()
    assert "compare.html: written" in capsys.readouterr().out
    assert main(["compare", str(runs[0]), "no"]) == 2
    assert "error: no has no liar/report.json\nhint: give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "quartiles"),
    [
        ([3], (3, 3, 3)),
        ([1, 3], (2, 1.5, 2.5)),
        ([5, 1, 3], (3, 2, 4)),
        ([4, 1, 3, 2], (2.5, 1.75, 3.25)),
        ([5, 4, 3, 2, 1], (3, 2, 4)),
    ],
)
def test_quartiles(values, quartiles):
    assert Quartiles.of(values) == Quartiles(*quartiles)


def test_a_benchmark_is_read_as_it_was_stored(tmp_path):
    folder = save(tmp_path / "run", ordinary(2))
    bench = bench_of(folder)
    read = read_bench(store_bench(folder))
    assert read == bench and sections.speed(read) == sections.speed(bench)


def test_the_table_leaves_out_what_is_not_known_of_the_dense_model():
    rate = Rate(1, "decode", "tokens/s", *(Quartiles(x, 1, 2) for x in (1234.5, 1000, 1.25)))
    pruned = ModelFacts("x", 10, 5 << 20, {"1": 7 << 20})
    assert sections.speed(Benchmark(pruned, ModelFacts("y"), rates=[rate])).rows == [
        ("batch 1: decode, tokens/s", "1,000", "1,234", "1.250 (1.000–2.000)"),
        ("parameters", "", "10", ""),
        ("weights, MiB", "", "5", ""),
        ("peak memory, batch 1, MiB", "", "7", ""),
    ]


@pytest.mark.parametrize("fields", [{}, {"version": 2, "rates": []}, {"version": 1, "rates": 3}])
def test_what_is_no_benchmark_is_refused(fields, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="is no benchmark of version 1"):
        read_bench(path)
