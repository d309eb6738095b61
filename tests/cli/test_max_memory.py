"""`liar prune --max-memory`: the same folder as without it, or one line on why not."""

from __future__ import annotations

import json

import pytest
import torch
from command import run

from liar_ext import load_pruned, verify_pruned
from liar_ext.cli.inputs import OWN_SHARE


@pytest.fixture(scope="module")
def command(llama_folder, corpus):
    """The command but for its output."""
    sizes = ["--keep", 0.7, "--samples", 16, "--seq-len", 32, "--self-text", 0]
    sizes += ["--schedule", "layerwise"]  # auto measures in memory alone
    sizes += ["--eval", corpus[1]]
    return ["prune", llama_folder, "--calibration", corpus[0], *sizes]


def test_the_folder_is_that_of_the_job_in_memory(command, tmp_path, capsys):
    command = [*command, "--certify", 4]
    assert run(*command, "--out", tmp_path / "whole", "--quiet") == 0
    assert run(*command, "--out", tmp_path / "blocks", "--max-memory", "4GiB") == 0
    shown = capsys.readouterr()
    assert f"{tmp_path / 'blocks'}: saved after" in shown.out
    assert all(line.startswith("warning: ") for line in shown.err.splitlines())
    assert "offloaded" not in shown.err and "device_map" not in shown.err
    ours, theirs = (load_pruned(tmp_path / name).state_dict() for name in ("blocks", "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    ours, theirs = (
        json.loads((tmp_path / name / "liar/report.json").read_text())
        for name in ("blocks", "whole")
    )
    assert ours["evaluation"] == theirs["evaluation"]
    assert ours["warnings"] == [each.replace(OWN_SHARE, "") for each in theirs["warnings"]]
    assert ours["seconds"].keys() == theirs["seconds"].keys()
    assert ours["settings"].pop("max_memory") == 4 << 30
    assert ours["settings"].pop("hidden_states_on_disk") == 0
    assert ours["settings"] == theirs["settings"]
    files = (sorted(path.name for path in (tmp_path / n).rglob("*")) for n in ("blocks", "whole"))
    assert len({tuple(names) for names in files}) == 1
    assert verify_pruned(tmp_path / "blocks")["agrees"]


def test_a_dry_run_says_what_it_would_take(command, capsys, tmp_path):
    assert run(*command, "--max-memory", "4GiB", "--dry-run", "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("LlamaForCausalLM", "memory", "hidden states", "weights"),
    ]
    assert "3 blocks" in lines[0] and "of 4 GiB" in lines[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-memory", "1MiB"], "--max-memory must be at least"),
        (["--max-memory", "4GiB", "--rescale"], "--rescale needs the whole model"),
        (["--max-memory", "4GiB", "--device", "auto"], "is for one device"),
        (["--max-memory", "4GiB", "--certify", "4", "--schedule", "one-pass"], "--certify with"),
    ],
)
def test_what_cannot_be_is_refused(command, options, said, tmp_path, capsys):
    assert run(*command, "--out", tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--bank", "--calibration"])
def test_what_needs_the_whole_model_is_refused(option, llama_folder, tmp_path, capsys):
    options = [option, "self", "--out", tmp_path / "out", "--max-memory", "4GiB"]
    assert run("prune", llama_folder, *options) == 2
    assert "need all of the model or its statistics in memory" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["4", "GiB", "-1GiB", "0GB", "4 parsecs", ""])
def test_a_size_has_a_unit(command, size, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run(*command, "--out", tmp_path, f"--max-memory={size}")
    assert left.value.code == 2
    assert "must be a number and a unit, such as 12GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("3GiB", 3 << 30), ("1.5GiB", 3 << 29), ("500MB", 5 * 10**8)]
)
def test_sizes_are_read_as_accelerate_reads_them(text, size):
    from accelerate.utils import convert_file_size_to_int

    from liar_ext.cli.main import parse

    assert parse(["prune", "m", "--max-memory", text]).max_memory == size
    assert convert_file_size_to_int(text) == size
    assert parse(["prune", "m", "--max-memory", "2 tb"]).max_memory == 2 * 10**12
