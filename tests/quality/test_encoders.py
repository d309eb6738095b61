"""The bench of encoders on a tiny model: every task, and rows that a second run completes."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from tiny import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """A tiny encoder, and data of the three tasks."""
    folder, draw = tmp_path_factory.mktemp("encoders"), random.Random(0)

    def sentence() -> str:
        return "".join(draw.choices("abcdefghij ", k=draw.randint(8, 40))).strip() + "."

    tiny("bert", max_position_embeddings=128).bert.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    (folder / "stsb").mkdir()
    for split, count in (("train", 60), ("test", 20)):
        rows = (f"a\tb\tc\td\t{draw.random()}\t{sentence()}\t{sentence()}\n" for _ in range(count))
        (folder / "stsb" / f"sts-{split}.csv").write_text("".join(rows))
    (folder / "sst2").mkdir()
    for split, count in (("train", 64), ("test", 20)):
        rows = (f"{sentence()}\t{index % 2}\n" for index in range(count))
        (folder / "sst2" / f"{split}.tsv").write_text("".join(rows))
    for index in range(60):
        path = folder / "news" / "abc"[index % 3] / f"{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{sentence()}\n\n{sentence()}\n")
    return folder


@pytest.fixture
def run(data, monkeypatch):
    """Give a function that runs the script and returns the rows that its file has."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import encoders

    tasks = [word for name in ("stsb", "sst2", "news") for word in (f"--{name}", data / name)]

    def run(out: Path, *more: str) -> list[dict]:
        monkeypatch.setattr(encoders, "folders", dict)
        line = ["encoders.py", data / "encoder", *tasks, "--keep", "0.5", "--samples", "16"]
        monkeypatch.setattr(sys, "argv", [*map(str, line), "--out", str(out), *more])
        encoders.main()
        return json.loads((out / "encoders.json").read_text())

    return run


@pytest.mark.exhaustive
def test_every_task_has_its_rows_and_a_second_run_makes_what_is_missing(run, tmp_path):
    rows = run(tmp_path, "--seeds", "0", "--keep-hidden", "0.5")
    judged = {(row["task"], row["calibration"]) for row in rows if row["method"] == "auto"}
    sentences = {
        (task, calibration)
        for task in ("STS-B, Spearman", "news, recall@1 of 9")
        for calibration in ("STS-B", "news")
    }
    assert judged == sentences | {("SST-2, accuracy", "SST-2")}
    hidden = [row for row in rows if "hidden" in row["method"]]
    assert len(hidden) == 2 * 3 and all(row["keep"] < 1 for row in hidden)
    pruned = [row for row in rows if row not in hidden]
    assert all(row["keep"] <= 0.5 and row["tokens"] >= 512 for row in pruned)
    chosen = [row for row in pruned if row["method"] == "auto"]
    assert all(row["schedule"] in row["schedules"] for row in chosen)
    for row in chosen:  # auto is one of the two that it measured
        same = ("task", "calibration", "seed")
        (other,) = (
            each
            for each in pruned
            if each["method"] == row["schedule"] and all(each[n] == row[n] for n in same)
        )
        assert other["pruned"] == row["pruned"]
    kept = {(row["task"], row["dense"]) for row in rows}
    assert len(kept) == 3  # each task has one figure of the dense model
    again = run(tmp_path, "--seeds", "0", "1", "--keep-hidden", "0.5")
    assert again[: len(rows)] == rows and len(again) == len(rows) + len(pruned)
    assert {row["seed"] for row in again[len(rows) :]} == {1}


def test_calibration_and_judging_share_no_article(data, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from encoder_tasks import news_apart

    (rest, test), (same, dev) = (news_apart(data / "news", judge) for judge in ("test", "dev"))
    assert rest == same and len(rest) + len(test) + len(dev) == 60
    parts = {part for article in rest for part in article.split("\n\n")}
    assert parts.isdisjoint({part for pair in test + dev for part in pair})
    assert {pair[0] for pair in test}.isdisjoint({pair[0] for pair in dev})
