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
from liar_ext.checkpoint.folder import REPORT_JSON
from liar_ext.export import gguf


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


def test_options_of_other_formats_are_refused(pruned, capsys):
    assert run(pruned, "--to", "uniform", "--quantize", "q8_0") == 2
    assert "has no option quantize\nhint: it has multiple_of" in capsys.readouterr().err


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
