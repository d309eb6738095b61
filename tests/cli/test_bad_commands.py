"""Every bad command line of ``make reliability`` ends in one line and exit code 2."""

from __future__ import annotations

import sys

import pytest
from reliability import commands

from liar_ext import InputError
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.export import export
from liar_ext.measure.evaluation import load_tasks
from liar_ext.report.pictures import drawing


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    work = tmp_path_factory.mktemp("commands")
    return commands.make_inputs(work), work


def test_there_are_enough_of_them():
    assert len(set(commands.lines())) == commands.FULL >= 150


def test_every_bad_command_line_is_refused_in_one_line(inputs):
    paths, work = inputs
    found = [
        (line, *commands.attempt(commands.fill(line, paths), work)) for line in commands.lines()
    ]
    assert not [each for each in found if each[1] != "refused"]


@pytest.mark.parametrize("verdict", ["traceback", "left behind"])
def test_what_is_bad_would_be_seen(inputs, monkeypatch, verdict):
    paths, work = inputs

    def wrong(options):
        if verdict == "left behind":
            (work / "litter").write_text("")
        raise OSError("a line") if verdict == "left behind" else KeyError("x")

    monkeypatch.setattr("liar_ext.cli.info.run_verify", wrong)
    assert commands.attempt(["verify", "x"], work)[0] == verdict


def test_running_the_model_or_success_would_be_seen(inputs):
    paths, work = inputs
    line = ["eval", paths["model"], "--text", paths["text"], "--seq-len", "8"]
    verdict, said = commands.attempt(line, work)
    assert verdict == "traceback" and "the model was run" in said
    verdict, said = commands.attempt(["families"], work)
    assert verdict == "traceback" and "exit code 0" in said


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("matplotlib", lambda: drawing("report").__enter__()),
        ("gguf", lambda: export("nowhere", "gguf")),
        ("accelerate", lambda: BlockStore("nowhere")),
        ("lm_eval", lambda: load_tasks(["arc_easy"])),
    ],
)
def test_a_package_that_raises_at_import_is_one_that_is_missing(
    package, use, tmp_path, monkeypatch
):
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('broken by its update')")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"\(?broken by its update\)?[;:] pip install \S"):
        use()
