"""``liar calibrate``, ``liar merge``, ``liar sweep`` and ``liar prune --bank``."""

from __future__ import annotations

import json
import re
import shutil
import string
from argparse import Namespace

import pytest
import torch
from command import refused, run
from safetensors.torch import load_file
from tiny import tiny

from liar_ext import InputError, MomentBank, Recipe
from liar_ext.calibration import collect
from liar_ext.checkpoint import loading
from liar_ext.cli.calibrate import recipe_of_bank
from liar_ext.system.checkpoint_store import VERSION, Checkpoint

TEXT = ("--samples", 8, "--seq-len", 32, "--self-text", 0, "--random-tokens", 0)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three calibration texts that have nothing in common."""
    folder, found = tmp_path_factory.mktemp("texts"), []
    for seed in range(3):
        drawn = torch.randint(0, 26, (40, 60), generator=torch.Generator().manual_seed(seed))
        rows = ["".join(string.ascii_lowercase[i] for i in row) for row in drawn.tolist()]
        found.append(folder / f"{seed}.jsonl")
        found[-1].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def banks(llama_folder, texts, tmp_path_factory):
    """A bank with text, one without that has sensitivities, and one of the third text."""
    folder = tmp_path_factory.mktemp("banks")
    more = [(), ("--no-text", "--sensitivities"), ("--quiet",)]
    for number, (text, options) in enumerate(zip(texts, more, strict=True)):
        path = folder / f"{number}.bank"
        command = ("calibrate", llama_folder, "--calibration", text, "--out", path)
        assert run(*command, *TEXT, *options) == 0
    return [folder / f"{number}.bank" for number in range(3)]


def test_a_bank_says_where_it_comes_from(banks, texts):
    facts = MomentBank.load(banks[0]).source
    (how,) = facts["calibrations"]
    assert how["texts"] == facts["texts"] == [str(texts[0])]
    assert (how["samples"], how["seq_len"], how["seed"], how["batch_size"]) == (8, 32, 0, 4)
    assert how["random_tokens"] == 0.0
    assert facts["sequences"] == 8 and facts["tokens"] == 256 and facts["seq_len"] == 32
    assert len(MomentBank.load(banks[0]).documents) == 40
    assert MomentBank.load(banks[1]).text is None
    assert len(MomentBank.load(banks[1]).source["sensitivities"]) == 1


@pytest.mark.parametrize(("name", "value"), [("random_tokens", 1.0), ("samples", "8")])
def test_a_draw_that_no_recipe_has_is_refused(banks, name, value):
    source = MomentBank.load(banks[0]).source
    source["calibrations"][0][name] = value
    with pytest.raises(InputError, match=f"{name} must be"):
        recipe_of_bank(Recipe(), source, Namespace(command="prune"))


def test_prune_by_a_bank_gives_what_prune_gives(banks, llama_folder, corpus, tmp_path, monkeypatch):
    """And its recipe repeats it without the bank."""
    options = ("--keep", 0.7, "--tile", 1, "--eval", corpus[1], "--eval-samples", 2, "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(collect, "collect", lambda *_, **__: pytest.fail("calibrated again"))
        out = tmp_path / "by_bank"
        assert run("prune", llama_folder, "--bank", banks[0], "--out", out, *options) == 0
    recipe = out / "liar/recipe.yaml"
    assert run("prune", "--recipe", recipe, "--out", tmp_path / "again", "--quiet") == 0
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("by_bank", "again"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    reports = [
        json.loads((tmp_path / n / "liar/report.json").read_text()) for n in ("by_bank", "again")
    ]
    assert reports[0]["sites"] == [
        {**row, "seconds": reports[0]["sites"][i]["seconds"]}
        for i, row in enumerate(reports[1]["sites"])
    ]
    assert reports[0]["warnings"] == reports[1]["warnings"]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
    assert reports[0]["settings"].pop("bank") == str(banks[0])
    assert reports[0]["settings"] | {"calibrate_passes": 1} == reports[1]["settings"]


def test_a_sweep_prints_a_table_and_writes_folders(banks, llama_folder, corpus, tmp_path, capsys):
    command = ("sweep", llama_folder, "--bank", banks[0], "--keep", 0.9, 0.8, "--tile", 1)
    capsys.readouterr()
    assert run(*command, "--quiet") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = "keep predicted divergence parameters of dense operations seconds"
    assert lines[0] == heads.split()
    assert [line[0] for line in lines[1:]] == ["dense", "0.9", "0.8"]
    assert run(*command, "--json", "--eval", corpus[1], "--out", tmp_path / "out") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dense"]["perplexity"] > 1
    for row, line in zip(facts["budgets"], lines[2:], strict=True):
        folder = tmp_path / "out" / f"keep-{row['keep']:g}"
        assert row["folder"] == str(folder)
        report = json.loads((folder / "liar/report.json").read_text())
        assert report["params"]["after"] == row["params"] == int(line[2].replace(",", ""))
        perplexity = report["evaluation"]["pruned"]["perplexity"]
        assert perplexity == pytest.approx(row["perplexity"], rel=1e-5)
        assert f"{row['predicted_divergence']:.4g}" == line[1]
        assert "of one kind of text" in " ".join(report["warnings"])
    assert "exists" in refused(capsys, *command, "--out", tmp_path / "out")
    alone = tmp_path / "alone"
    again = ("prune", "--recipe", folder / "liar/recipe.yaml", "--out", alone, "--quiet")
    assert run(*again) == 0
    one, other = (load_file(each / "model.safetensors") for each in (folder, alone))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_sweep_by_text_needs_no_bank(llama_folder, texts, capsys):
    options = ("--keep", 0.8, "--allocation", "uniform", *TEXT)
    assert run("sweep", llama_folder, "--calibration", texts[0], *options) == 0
    out = capsys.readouterr()
    assert re.search(r"0\.8 +–", out.out)
    assert "warning: The calibration set is of one kind" in out.err


def test_a_bank_without_text_serves_what_needs_none(banks, llama_folder, tmp_path, capsys):
    command = ("sweep", llama_folder, "--bank", banks[1])
    assert run(*command, "--quiet") == 0  # its sensitivities are those of a sweep
    assert "criterion obs" not in (said := refused(capsys, *command, "--criterion", "obs"))
    assert "allocation curve runs the model over the calibration text" in said
    assert "schedule layerwise runs" in refused(capsys, *command, "--out", tmp_path / "out")
    options = ("--schedule", "one-pass", "--keep", 0.8, "--quiet", "--out", tmp_path / "out")
    assert run(*command, *options) == 0


def test_banks_add_up_whatever_their_order(banks, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run("merge", *banks, "-o", one) == 0
    said = "".join(capsys.readouterr())
    assert "768 tokens in 24 sequences of 3 banks" in said and f"since {banks[1]} has none" in said
    assert "Sensitivities are left out" in said
    assert run("merge", *reversed(banks), "-o", other, "--quiet") == 0
    assert one.read_bytes() == other.read_bytes()
    whole = MomentBank.load(one)
    parts = [MomentBank.load(path) for path in banks]
    for name in whole:
        total = sum(part[name].gram for part in parts)
        torch.testing.assert_close(whole[name].gram, total, rtol=1e-13, atol=0)
        assert torch.equal(whole[name].count, sum(part[name].count for part in parts))
    assert len(whole.source["calibrations"]) == 3 and len(whole.source["texts"]) == 3
    assert "can't be added" in refused(capsys, "merge", banks[0], one, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_merged_bank_prunes(banks, llama_folder, tmp_path):
    assert run("merge", banks[0], banks[2], "-o", tmp_path / "bank", "--quiet") == 0
    out = tmp_path / "out"
    command = ("prune", llama_folder, "--bank", tmp_path / "bank", "--out", out, "--quiet")
    assert run(*command) == 0
    report = json.loads((out / "liar/report.json").read_text())
    assert report["settings"]["calibration_sequences"] == 16
    assert report["recipe"]["calibration"] == [] and report["recipe"]["seq_len"] == 32


def test_what_can_not_be_added_says_which_and_why(banks, llama_folder, texts, tmp_path, capsys):
    out = ("-o", tmp_path / "out")
    copied = shutil.copy(banks[0], tmp_path / "copy")
    said = refused(capsys, "merge", banks[0], copied, *out)
    assert "can't be added to" in said and "8 sequences over the same text" in said
    assert "over the same text" in refused(capsys, "merge", banks[0], banks[0], *out)
    assert "at least two" in refused(capsys, "merge", banks[0], *out)
    assert "no file" in refused(capsys, "merge", banks[0], tmp_path / "none", *out)
    torn = tmp_path / "torn"
    torn.write_bytes(banks[2].read_bytes()[:-100])
    assert "damaged" in refused(capsys, "merge", banks[0], torn, *out)
    wide = tmp_path / "wide"
    options = ("--calibration", texts[1], "--dtype", "float64", "--out", wide, "--quiet", *TEXT)
    assert run("calibrate", llama_folder, *options) == 0
    assert "same --dtype" in refused(capsys, "merge", banks[0], wide, *out)
    units = tmp_path / "units"
    options = ("--calibration", texts[1], "--attn-unit", "head", "--out", units, "--quiet", *TEXT)
    assert run("calibrate", llama_folder, *options) == 0
    assert "same --attn-unit" in refused(capsys, "merge", banks[0], units, *out)
    assert not (tmp_path / "out").exists()


def test_a_bank_is_not_written_over_anything_else(banks, llama_folder, texts, tmp_path, capsys):
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    start = ("calibrate", llama_folder, "--calibration", texts[0], *TEXT, "--quiet", "--out")
    for options in ((), ("--overwrite",)):
        assert "replaces a bank and nothing else" in refused(capsys, *start, other, *options)
    bank = shutil.copy(banks[2], tmp_path / "bank")
    assert "exists" in refused(capsys, *start, bank)
    assert run(*start, bank, "--overwrite") == 0
    assert bank.read_bytes() == banks[0].read_bytes()  # the same text gives the same bytes
    assert "no folder" in refused(capsys, *start, tmp_path / "none" / "bank")
    assert other.read_text() == "mine"


def test_what_contradicts_a_bank_is_refused(
    banks, llama_folder, texts, corpus, tmp_path, capsys, monkeypatch
):
    out = ("--out", tmp_path / "out")
    start = ("prune", llama_folder, "--bank", banks[0], *out)
    for options, message in (
        (("--samples", 4), "--samples is of the calibration, which the bank holds"),
        (("--seq-len", 16), "--seq-len is of the calibration"),
        (("--calibration", texts[0]), "--calibration is of the calibration"),
        (("--certify", 4), "--certify 4 does not work with a bank"),
        (("--dry-run",), "--dry-run tells what a calibration would take"),
        (("--keep-hidden", 0.5), "--keep-hidden 0.5 does not work with a bank"),
        (("--dtype", "float64"), "in float32, got float64"),
        (("--eval", texts[0]), "40 of 40 documents are in the calibration text"),
    ):
        assert message in refused(capsys, *start, *options)
    other = tmp_path / "other"
    tiny("llama", seed=4).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_folder / name, other / name)
    assert "of other weights" in refused(capsys, "prune", other, "--bank", banks[0], *out)
    fields = json.loads((other / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(fields))
    assert "another tokenizer" in refused(capsys, "prune", other, "--bank", banks[0], *out)
    assert "--calibration TEXT" in refused(capsys, "prune", llama_folder, *out)
    assert "needs --bank FILE or --calibration TEXT" in refused(capsys, "sweep", llama_folder)
    assert "--out FILE" in refused(capsys, "calibrate", llama_folder, "--calibration", texts[0])
    sweep = ("sweep", llama_folder, "--bank", banks[0])
    assert "each fraction once" in refused(capsys, *sweep, "--keep", 0.8, 0.8)
    assert "keep must be" in refused(capsys, *sweep, "--keep", 1.8)
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("loaded"))
    assert "no file" in refused(capsys, "prune", llama_folder, "--bank", "none", *out)
    assert not (tmp_path / "out").exists()


def test_a_sealed_bank_that_no_calibration_gives(banks, llama_folder, tmp_path, capsys):
    out = ("--out", tmp_path / "out", "--quiet")
    bank = MomentBank.load(banks[0])
    bank.source["calibrations"] = []
    bank.save(tmp_path / "a.bank")
    fast = ("--preset", "fast", "--keep", 0.7)
    assert run("prune", llama_folder, "--bank", tmp_path / "a.bank", *fast, *out) == 0
    bank.text[0]["input_ids"][0, 0] = 10**6
    bank.save(tmp_path / "b.bank")
    command = ("prune", llama_folder, "--bank", tmp_path / "b.bank", *out, "--overwrite")
    assert "has token 1000000" in refused(capsys, *command)


def test_a_calibration_that_was_stopped_is_resumed(
    banks, llama_folder, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (lambda: 0.0,))
    start = ("calibrate", llama_folder, "--calibration", texts[0], *TEXT, "--batch-size", 1)
    start += ("--checkpoint", "c", "--out", "bank")
    assert run(*start[:-4], "--out", "whole", "--quiet") == 0
    batch, seen = collect.InFlight.set, []

    def stop(self, of):
        seen.append(of)
        if len(seen) == 6:
            raise KeyboardInterrupt
        batch(self, of)

    with monkeypatch.context() as patch:
        patch.setattr(collect.InFlight, "set", stop)
        assert run(*start) == 130
    assert "error: interrupted\nhint: liar resume c goes on" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name != ".lock") == [
        *("calibration.safetensors", "job.safetensors"),
    ]
    assert "of a job with samples 8, got 6" in refused(capsys, *start, "--samples", 6)
    assert "of a job with no_text False, got True" in refused(capsys, *start, "--no-text")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree("c", "again")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("resume", "../c") == 0
    said = capsys.readouterr().out
    assert f"stopped with sums over 5 of 8 batches; going on in {tmp_path}" in said
    assert "bank: moments of" in said
    assert (tmp_path / "bank").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "c").exists()
    monkeypatch.chdir(tmp_path)
    assert "bank exists" in refused(capsys, "resume", "again")  # of part of the text
    (tmp_path / "bank").unlink()
    assert run(*start[:-4], "--checkpoint", "again", "--out", "bank", "--quiet") == 0
    assert (tmp_path / "bank").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "again").exists()


OWN = {"out": "b", "no_text": False, "sensitivities": False}


@pytest.mark.parametrize(
    "job",
    [
        *({}, {"version": 1}),
        {"command": "merge", "folder": "/", "options": {}},
        {"command": "calibrate", "folder": "/", "options": {"out": 3}},
        {"command": "calibrate", "folder": "/", "options": OWN},
        {"command": "calibrate", "folder": "/", "recipe": 3, "options": OWN},
        {"command": "calibrate", "folder": "/", "recipe": {"x": 1}, "options": OWN},
        {"command": "calibrate", "folder": "/none", "recipe": {"model": "m"}, "options": OWN},
    ],
    ids=range(8),
)
def test_what_is_no_job_is_not_resumed(job, tmp_path, capsys):
    with Checkpoint(tmp_path) as saved:
        saved.put("job", facts={"version": VERSION} | job)
    said = refused(capsys, "resume", tmp_path)
    assert "is no job of this version" in said or "can't go to" in said
    assert "has no job.safetensors" in refused(capsys, "resume", tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10000], ids=range(3))
def test_a_job_that_is_no_file_of_a_checkpoint_is_not_resumed(content, tmp_path, capsys):
    (tmp_path / "job.safetensors").write_bytes(content)
    assert "is no job of this version" in refused(capsys, "resume", tmp_path)


def test_a_checkpoint_takes_no_folder_of_others(llama_folder, texts, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/mine").write_text("")
    start = ("calibrate", llama_folder, "--calibration", texts[0], *TEXT, "--out", tmp_path / "b")
    said = refused(capsys, *start, "--checkpoint", tmp_path / "theirs")
    assert "must be a new or empty folder" in said and "mine" in said
