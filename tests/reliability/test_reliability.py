"""A few attacks of each kind, and proof that the harness sees what it looks for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from covers import some

from reliability.__main__ import RECORD, TABLE, attack, load_checks, to_markdown
from reliability.outcome import Outcome, in_child

SEED = 7


# Those that start processes, or try whole folders, take many seconds.
LONG = ("tampered folders", "files of strangers", "ranks that are stopped")
LONG += ("kills in the save phase", "jobs that are stopped")


CHECKS = {check.TITLE: check for check in load_checks()}


@some("title", CHECKS, *(title for title in CHECKS if title not in LONG))
def test_a_few_attacks(title: str) -> None:
    check = CHECKS[title]
    row = attack(check, check.SHORT, SEED)
    assert row["cases"] == check.SHORT and row["bad"] == []


def test_the_page_is_that_of_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert TABLE.read_text(encoding="utf-8") == to_markdown(record)
    assert all(row["bad"] == [] for row in record["checks"])


def test_a_child_tells_what_came_of_it() -> None:
    assert in_child(lambda: 7)[:2] == ("value", 7)
    kind, text, _ = in_child(lambda: [][0])
    assert kind == "error" and "IndexError" in text
    assert in_child(lambda: time.sleep(30), limit=0.2)[0] == "hang"
    assert in_child(lambda: __import__("os").kill(__import__("os").getpid(), 9))[0] == "crash"
    assert in_child(lambda: __import__("os")._exit(0))[0] == "crash"  # without an answer


@pytest.mark.parametrize("verdict", ["traceback", "code run", "hang"])
def test_what_is_bad_is_counted(verdict: str) -> None:
    class Check:
        TITLE = "a check"

        @staticmethod
        def run(count: int, seed: int, work: Path):
            yield Outcome("a check", "case", "call", verdict, 0.1)

    row = attack(Check, 1, SEED)
    assert row["verdicts"] == {verdict: 1} and len(row["bad"]) == 1


@pytest.mark.exhaustive
def test_code_of_a_folder_would_be_seen(monkeypatch) -> None:
    """With the check of the folder's code removed, the attack on it shows."""
    from liar_ext.export import verify
    from reliability import folders_attacked

    monkeypatch.setattr(
        verify,
        "check_code",
        lambda folder, config: sorted(
            config.get("auto_map") or {}, key="AutoModelForCausalLM".__ne__
        ),
    )
    row = attack(folders_attacked, 18, SEED)
    assert {bad["verdict"] for bad in row["bad"]} >= {"code run"}


@pytest.mark.exhaustive
def test_an_unlocked_moment_would_be_seen(monkeypatch) -> None:
    """Writing in place, as an ordinary save does, loses data when it is killed."""
    import shutil

    from liar_ext.checkpoint import placing, saving
    from reliability import kills

    def in_place(path: Path, folder: Path, overwrite: bool) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(path, folder)
        (folder / placing.MARKER_FILE).unlink()

    monkeypatch.setattr(saving, "put_in_place", in_place)
    assert attack(kills, 24, SEED)["verdicts"].get("data lost")
