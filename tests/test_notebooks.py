"""The notebooks of docs/notebooks: their cells run on tiny models, and hold what a run printed."""

from __future__ import annotations

import json

import notebooks
import pages
import pytest
from test_docs import ROOT, tables  # noqa: F401  (a fixture)

HERE = ROOT / "docs" / "notebooks"
MODELS = {"encoder": "encoder", "criterion": "model"}  # of tests/pages.py


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    pages.prepare(folder)
    return folder


def test_each_notebook_is_tried():
    assert {path.stem for path in HERE.iterdir()} == set(MODELS)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", MODELS)
def test_the_cells_run(name, beginning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIAR_MODEL", str(beginning / MODELS[name]))
    monkeypatch.setenv("LIAR_TEXT", str(beginning / "calibration.jsonl"))
    notebook, committed = read(name), read(name)
    notebooks.run(notebook)
    for cell, shown in zip(notebook["cells"], committed["cells"], strict=True):
        if cell["cell_type"] == "code":
            lines, expected = printed(cell), printed(shown)
            assert len(lines) == len(expected), "run tests/notebooks.py again"
            assert list(map(words, lines)) == list(map(words, expected))


def printed(cell: dict) -> list[str]:
    return [line for output in cell["outputs"] for line in output["text"]]


def words(line: str) -> str:
    """Return a line without its numbers."""
    return pages.pattern(line)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_stored_is_small_and_valid(name):
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    assert len((HERE / f"{name}.ipynb").read_bytes()) < 20_000


def test_a_cell_that_fails_is_named():
    cells = [{"cell_type": "code", "source": [line]} for line in ("x = 1\n", "x / 0\n")]
    with pytest.raises(ZeroDivisionError) as seen:
        notebooks.run({"cells": cells}, "a")
    assert str(seen.traceback[-1].path).endswith("a, cell 2")
