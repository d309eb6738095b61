"""The text that a language model writes beside that which a job names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command import run
from safetensors.torch import load_file
from tiny import tiny

from liar_ext import MomentBank
from liar_ext.calibration import generated
from liar_ext.cli import inputs
from liar_ext.cli.inputs import ONE_KIND
from liar_ext.cli.prune import NONE_WRITTEN
from liar_ext.system.checkpoint_store import Checkpoint

SIZES = ["--samples", 8, "--seq-len", 16, "--keep", 0.7]


def settings_of(folder) -> dict:
    return json.loads((folder / "liar/report.json").read_text())["settings"]


def weights_of(folder) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def asked(monkeypatch):
    """What models are asked to write."""
    found, write = [], inputs.write_sequences

    def noted(*given, **how):
        found.append(how)
        return write(*given, **how)

    monkeypatch.setattr(inputs, "write_sequences", noted)
    return found


def test_a_third_as_many_sequences_come_beside_the_text(llama_folder, corpus, tmp_path, asked):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--quiet"]
    assert run(*command, "--out", tmp_path / "with") == 0
    (how,) = asked
    assert (how["count"], how["seq_len"], how["written"]) == (3, 16, 16)
    settings = settings_of(tmp_path / "with")
    assert settings["calibration_sequences"] == 8 + settings["written_sequences"] == 11
    assert run(*command, "--out", tmp_path / "without", "--self-text", 0) == 0
    settings = settings_of(tmp_path / "without")
    assert settings["calibration_sequences"] == 8 + 3  # of random tokens, in its place
    assert "written_sequences" not in settings
    assert len(asked) == 1
    assert any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(
            weights_of(tmp_path / "with").values(),
            weights_of(tmp_path / "without").values(),
            strict=True,
        )
        if ours.shape == theirs.shape
    )
    # Once more it is the same text, and beside other text another.
    assert run(*command, "--out", tmp_path / "again") == 0
    ours, theirs = (weights_of(tmp_path / name) for name in ("with", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    command[3] = corpus[1]
    assert run(*command, "--out", tmp_path / "other") == 0
    assert asked[0]["seed"] == asked[1]["seed"] != asked[2]["seed"]


def test_a_set_of_one_kind_is_told_of_where_nothing_is_written(
    llama_folder, corpus, tmp_path, capsys
):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES]
    assert run(*command, "--out", tmp_path / "with") == 0
    assert ONE_KIND not in capsys.readouterr().err
    assert run(*command, "--out", tmp_path / "without", "--self-text", 0) == 0
    assert ONE_KIND in capsys.readouterr().err


def test_random_tokens_come_beside_it_if_they_are_asked_for(llama_folder, corpus, tmp_path):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--quiet"]
    assert run(*command, "--random-tokens", 0.5, "--out", tmp_path / "pruned") == 0
    assert settings_of(tmp_path / "pruned")["calibration_sequences"] == 8 + 8 + 3


def test_the_source_self_is_all_that_is_written(llama_folder, tmp_path, asked):
    command = ["prune", llama_folder, "--calibration", "self", *SIZES, "--quiet"]
    assert run(*command, "--out", tmp_path / "pruned") == 0
    assert not asked
    assert settings_of(tmp_path / "pruned")["calibration_sequences"] == 8


def test_encoders_write_nothing(tokenizer, corpus, tmp_path, asked):
    for each in (tiny("bert"), tokenizer):
        each.save_pretrained(tmp_path / "bert")
    command = ["prune", tmp_path / "bert", "--calibration", corpus[0], *SIZES, "--quiet"]
    assert run(*command, "--out", tmp_path / "pruned") == 0
    assert not asked


def test_a_model_that_is_read_by_blocks_writes_nothing_and_says_so(
    llama_folder, corpus, tmp_path, asked, capsys
):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--max-memory", "4GiB"]
    assert run(*command, "--out", tmp_path / "pruned") == 0
    assert not asked
    assert NONE_WRITTEN in capsys.readouterr().err
    assert "self_text: 0.0" in (tmp_path / "pruned/liar/recipe.yaml").read_text()
    assert run(*command, "--out", tmp_path / "asked", "--self-text", 0) == 0
    assert NONE_WRITTEN not in capsys.readouterr().err


def test_a_job_that_is_refused_wrote_nothing(llama_folder, corpus, tmp_path, asked, capsys):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES]
    command += ["--keep", 0.01, "--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c"]
    assert run(*command) == 2
    assert "no plan keeps 0.01" in capsys.readouterr().err
    assert not asked and not any(tmp_path.iterdir())


def test_a_bank_has_what_was_written(llama_folder, corpus, tmp_path, asked):
    command = ["calibrate", llama_folder, "--calibration", corpus[0], *SIZES[:4], "--quiet"]
    assert run(*command, "--out", tmp_path / "bank") == 0
    bank = MomentBank.load(tmp_path / "bank")
    (drawn,) = bank.source["calibrations"]
    assert bank.source["sequences"] == 11 and drawn["self_text"] == 0.25
    job = ["prune", llama_folder, "--keep", 0.7, "--quiet", "--schedule", "layerwise"]
    assert run(*job, "--bank", tmp_path / "bank", "--out", tmp_path / "by_bank") == 0
    assert len(asked) == 1
    assert run(*job, "--calibration", corpus[0], *SIZES, "--out", tmp_path / "by_text") == 0
    ours, theirs = (weights_of(tmp_path / name) for name in ("by_bank", "by_text"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sweep_writes_once(llama_folder, corpus, tmp_path, asked):
    command = ["sweep", llama_folder, "--calibration", corpus[0], *SIZES[:4], "--quiet"]
    assert run(*command, "--keep", 0.8, 0.6) == 0
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("more", "count"),
    [((), 4), (("self",), 2)],  # of 8 sequences of text, 3 written; of 8, half of them written
)
def test_a_dry_run_writes_beginnings_alone(more, count, llama_folder, corpus, capsys, monkeypatch):
    asked, write = [], generated._write

    def noted(model, tokenizer, documents, tokens, *more):
        asked.append((documents, tokens))
        return write(model, tokenizer, documents, tokens, *more)

    monkeypatch.setattr(generated, "_write", noted)
    command = ["prune", llama_folder, "--calibration", corpus[0], *more, "--dry-run"]
    assert run(*command, "--samples", 8, "--seq-len", 64) == 0
    ((documents, tokens),) = asked
    assert documents >= 3 and tokens == inputs.SKETCHED < 64
    said = capsys.readouterr().out
    assert "text of its own: about" in said and f"({count} batches)" in said


def test_a_checkpoint_that_holds_something_else(llama_folder, corpus, tmp_path, capsys):
    kept = {"input_ids": torch.full((3, 16), 10**6)}
    with Checkpoint(tmp_path / "kept") as progress:
        progress.put(inputs.WRITTEN, kept)
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--out", tmp_path / "out"]
    command += ["--checkpoint", tmp_path / "c"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "write_sequences", stop)
        assert run(*command) == 130
    shutil.copy(tmp_path / "kept/written.safetensors", tmp_path / "c")
    assert run(*command) == 2
    assert "has token 1000000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
