"""``liar doctor`` and ``liar --print-completion``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from liar_ext import cli
from liar_ext.cli import info

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "free")


@pytest.fixture
def room(monkeypatch):
    """Let memory and disk be as large as needed, whatever this machine has."""
    monkeypatch.setattr(info, "available_memory", lambda: 8 << 30)
    monkeypatch.setattr(info.shutil, "disk_usage", lambda _: Usage(8 << 30))


def test_one_screen_that_ends_in_ok(room, capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "ok" and len(said) <= 24
    text = "\n".join(said)
    assert re.search(r"^self-check +cpu: error \d\.\de-\d+ against float64", text, re.M)
    assert re.search(r"^extension +loaded, uses \w+ of .*portable$", text, re.M)
    for name in info.PACKAGES:
        assert re.search(rf"^{name} +(\d|missing: pip install )", text, re.M)


def test_the_same_as_json(room, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["self_check"]["cpu"] <= info.MOST_ERROR
    assert found["versions"]["torch"] and found["memory_free"] == 8 << 30


def test_every_extra_has_the_package():
    written = (ROOT / "pyproject.toml").read_text("utf-8")
    for name, extra in info.PACKAGES.items():
        assert extra is None or re.search(rf'^{extra} = \[.*"{name}>=', written, re.M), name


def test_a_wrong_kernel_is_told(room, monkeypatch, capsys):
    def wrong(gram, *_):
        gram += 1

    monkeypatch.setattr(info.ops, "gram_update_", wrong)
    assert cli.main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "the Gram operator fails on cpu: its error is" in last
    assert "LIAR_CPU_KERNEL=portable" in last


def test_a_device_without_kernels_is_told(room, monkeypatch):
    monkeypatch.setattr(info.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(info.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(
        info, "self_check", lambda device: 0.0 if device == "cpu" else "no kernel image"
    )
    found = info.facts()
    assert found["devices"] == {"cpu": "", "cuda:0": "a GPU"}
    (only,) = found["problems"]
    assert "fails on cuda:0: no kernel image" in only and "use --device cpu" in only
    assert "cpu, cuda:0 (a GPU)" in "\n".join(info.lines(found))


def test_an_error_of_the_operator_is_quoted(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(info.ops, "gram_update_", fails)
    assert info.self_check("cpu") == "no kernel image"


def test_too_little_room_is_told(monkeypatch):
    monkeypatch.setattr(info, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(info.shutil, "disk_usage", lambda _: Usage(1 << 29))
    memory, disk, _ = info.facts()["problems"]
    assert memory.startswith("only 0.0 GiB of memory") and disk.startswith("only 0.5 GiB of disk")


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", "bash"])
    assert stop.value.code == 2 and "pip install shtab" in capsys.readouterr().err


def test_completion_in_bash(tmp_path, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", "bash"])
    assert stop.value.code == 0
    (tmp_path / "liar.bash").write_text(capsys.readouterr().out)
    (tmp_path / "text.txt").touch()
    script = """source liar.bash
    try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_liar liar "${@: -1}"
            echo "${COMPREPLY[@]}"; }
    try liar doc; try liar prune --preset ba; try liar prune MODEL --calibration te
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["doctor", "balanced", "text.txt"], done.stderr
