"""The whole bench on a tiny model, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import forked
import pytest
import torch

from bench.quality.options import parse
from bench.quality.record import Record
from bench.quality.run import estimate, run

METHODS = ("liar", "wifv+global+bias", "liar+layerwise")
NAMES = ("web", "code")


def write_text(path: Path, documents: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    letters = torch.tensor(list(b"abcdefghij klmno. "))

    def document() -> str:
        drawn = letters[torch.randint(len(letters), (120,), generator=generator)]
        return bytes(drawn.tolist()).decode()

    path.write_text("".join(json.dumps({"text": document()}) + "\n" for _ in range(documents)))
    return str(path)


@pytest.fixture
def arguments(llama_folder, tmp_path):
    """What a run of seconds takes, without --out."""
    lines = [{"question": "what", "choices": ["a", "bcd"], "answer": 1}] * 5
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    judged = [f"{n}={write_text(tmp_path / f'{n}.jsonl', 4, i)}" for i, n in enumerate(NAMES)]
    return [
        *("--models", str(llama_folder)),
        *("--methods", *METHODS),
        *("--ratios", "0.3", "0.5"),
        *("--seeds", "0", "1"),
        *("--calibration", write_text(tmp_path / "calibration.jsonl", 8, 7)),
        *("--eval", *judged),
        *("--samples", "8", "--eval-samples", "3", "--seq-len", "24", "--prompts", "4"),
        *("--eval-dtype", "float32"),
        *("--questions", str(questions)),
        *("--texts", str(tmp_path / "texts")),
    ]


def start(arguments: list[str], out: Path) -> int:
    """Run the bench in a fork, and return its process."""
    said = Path(f"{out}.said")
    return forked.fork(lambda: run(parse([*arguments, "--out", str(out)])), said, said)


def rows_of(out: Path) -> list[dict]:
    """Return the rows, without the seconds, which no two runs share."""
    rows = json.loads((out / "quality.json").read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.exhaustive
def test_a_killed_run_goes_on_and_gives_the_same_rows(arguments, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(arguments, killed)
    kept = killed / "quality.json"
    while not (kept.exists() and len(rows_of(killed)) > 2):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), Path(f"{killed}.said").read_text()
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert forked.end(process) == -signal.SIGKILL
    before = rows_of(killed)
    assert 2 < len(before) < 13
    for out in (killed, whole):
        assert forked.end(start(arguments, out)) == 0, Path(f"{out}.said").read_text()
    after = rows_of(killed)
    assert after[: len(before)] == before and after == rows_of(whole)
    assert len(after) == 1 + len(METHODS) * 2 * 2
    options = parse([*arguments, "--out", str(whole)])
    assert estimate(Record(kept), options, list(METHODS)).startswith("0 rows")


def test_the_whole_bench(arguments, tmp_path, capsys):
    """What the rows hold, and that each of the dense model's own figures is that of no loss."""
    arguments[arguments.index("--seeds") + 2 : arguments.index("--calibration")] = []
    options = parse([*arguments, "--out", str(tmp_path / "out")])
    assert estimate(Record(tmp_path / "none"), options, list(METHODS)).startswith(
        "6 rows to measure"
    )
    run(options)
    rows = rows_of(tmp_path / "out")
    dense, others = rows[0], rows[1:]
    assert dense["method"] == "dense" and dense["summary"] == 0.0
    assert dense["continuation"] == {"equal_tokens": 32.0, "equal_share": 1.0, "kl": 0.0}
    assert all(abs(text["kl"]) < 1e-6 for text in dense["texts"].values())
    liar, flap, walk = METHODS
    assert [(row["ratio"], row["method"]) for row in others] == [
        *((ratio, method) for ratio in (0.3, 0.5) for method in (liar, walk)),
        *((ratio, flap) for ratio in (0.3, 0.5)),
    ]
    tokens = {row["method"].split("+")[0]: row["calibration_tokens"] for row in others}
    assert tokens["liar"] > tokens["wifv"]  # which others' configurations don't get
    for row in others:
        texts = row["texts"].values()
        assert list(row["texts"]) == list(NAMES)
        assert row["summary"] == sum(text["log_ratio"] for text in texts) / 2
        assert all(text["dense"] == dense["texts"][n]["dense"] for n, text in row["texts"].items())
        assert row["choices"]["questions"] == 5 and row["continuation"]["kl"] > 0
        assert row["ratio"] - 0.01 < row["removed"]["all"] < row["ratio"] + 0.2
        assert row["recipe"]["tile"] == 1 and row["recipe"]["seed"] == 0
    told = capsys.readouterr().out
    assert "6 rows to measure: about" in told and "0 rows to measure" in told
    table = (tmp_path / "out" / "quality.md").read_text()
    assert all(f"`{method}`" in table for method in METHODS)
    assert "`wifv+global+bias` (configuration of ours)" in table
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000
    assert not list((tmp_path / "out").glob(".quality*"))


def test_the_short_form():
    short, whole = parse(["--short"]), parse([])
    assert len(whole.models) == 2 and whole.seeds == [0, 1] and whole.question_count == 500
    assert short.models == whole.models[:1] and short.seeds == [0] and len(short.methods) == 3
    assert short.ratios == [0.2] and short.out != whole.out
    assert parse(["--short", "--ratios", "0.5"]).ratios == [0.5]
