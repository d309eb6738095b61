"""``liar export`` by the command."""

from __future__ import annotations

import contextlib
import io
import json
import resource

import pytest
import transformers
from reliability.outcome import in_child

from liar_ext import cli, verify_pruned
from liar_ext.checkpoint.names import REPORT_JSON
from liar_ext.cli.replan import compare
from liar_ext.export import gguf
from liar_ext.export.record import read_record


@pytest.fixture(scope="module")
def pruned(llama_folder, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "pruned"
    command = ["prune", str(llama_folder), "--calibration", str(corpus[0]), "--out", str(out)]
    command += ["--eval", str(corpus[1]), "--keep", "0.6", "--samples", "16", "--seq-len", "32"]
    assert cli.main([*command, "--quiet"]) == 0
    return out


def run(*arguments) -> int:
    return cli.main(["export", *(str(argument) for argument in arguments)])


def test_vocabulary_without_bytes_is_told_of(pruned, capsys):
    assert run(pruned, "--to", "gguf") == 2
    assert "WordLevel, not BPE" in capsys.readouterr().err


def test_uniform_by_padding(pruned, tmp_path, capsys):
    out = tmp_path / "equal"
    assert run(pruned, "--to", "uniform", "-o", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["paths"] == [str(out)] and printed["bytes"] > 0
    transformers.AutoModelForCausalLM.from_pretrained(out)
    assert verify_pruned(out)["agrees"]
    report = json.loads((out / REPORT_JSON).read_text())
    assert "loads with plain" in report["loading"]
    assert report["uniform"]["source"] == "pruned" and report["evaluation"]["dense"]


def test_uniform_by_pruning_again(pruned, llama_folder, corpus, tmp_path, capsys):
    out = tmp_path / "again"
    assert run(pruned, "--to", "uniform", "-o", out, "--source", llama_folder) == 0
    printed = capsys.readouterr().out
    for name in ("parameters", "perplexity", "predicted divergence", "mean held-out error"):
        assert f"{name}" in printed and "unequal" in printed
    transformers.AutoModelForCausalLM.from_pretrained(out)
    assert verify_pruned(out)["layers"] == "equal"
    report = json.loads((out / REPORT_JSON).read_text())
    assert report["recipe"]["uniform_layers"] and report["recipe"]["keep"] == 0.6
    assert read_record(pruned)[-1]["options"]["source"] == str(llama_folder)
    assert run(pruned, "--to", "uniform", "-o", out, "--source", llama_folder) == 2
    assert "exists" in capsys.readouterr().err
    more = ("--overwrite", "--texts", corpus[1], "--quiet")  # which the recipe evaluates on
    assert run(pruned, "--to", "uniform", "-o", out, "--source", llama_folder, *more) == 2
    assert "document" in capsys.readouterr().err and verify_pruned(out)["agrees"]


def test_options_of_other_formats_are_refused(pruned, llama_folder, capsys):
    for options, words in {
        ("--to", "gguf", "--source", "x"): "--source is an option of --to uniform",
        ("--to", "uniform", "--texts", "x"): "--texts goes with --source MODEL",
        ("--to", "uniform", "--quantize", "q8_0"): "has no option quantize; it has multiple_of",
    }.items():
        assert run(pruned, *options) == 2
        assert words in capsys.readouterr().err
    assert run(llama_folder, "--to", "uniform", "--source", llama_folder) == 2
    assert "the choices of the job that --source repeats" in capsys.readouterr().err


def test_reports_that_are_damaged_are_compared_as_far_as_they_go():
    assert compare({}, {}) == ["The folder has no report to compare with."]
    assert compare({"sites": 3, "params": [], "evaluation": {"pruned": 1}}, {"sites": [1]}) == [
        "The folder has no report to compare with."
    ]
    both = {"params": {"after": 10}, "sites": [{"holdout_error": 0.5}, {"holdout_error": "inf"}]}
    assert compare(both, both) == [
        "parameters: 10 unequal, 10 equal layers",
        "mean held-out error of the sites: 0.5 unequal, 0.5 equal layers",
    ]


@pytest.mark.parametrize("to", ["gguf", "uniform"])
def test_a_full_disk_leaves_nothing_behind(to, pruned, tmp_path, monkeypatch):
    # The tokenizer of the tiny models has no GGUF form.
    monkeypatch.setattr(gguf, "add_tokenizer", lambda *_: [])

    def export_to_a_small_disk() -> tuple[int, str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = run(pruned, "--to", to, "-o", tmp_path / "out")
        return code, said.getvalue()

    kind, answer, _ = in_child(export_to_a_small_disk)
    assert kind == "value", answer
    code, said = answer
    assert code == 2 and "can't write" in said and "nothing was left behind" in said
    assert list(tmp_path.iterdir()) == []
