"""Where an export goes, what it may replace, and what is recorded of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import types

import pytest
from folders import equal_plan

from liar_ext import InputError, cli
from liar_ext.checkpoint.folder import EXPORTS_FILE, strangers
from liar_ext.export import FORMATS, Format, export
from liar_ext.export.exporting import read_record
from liar_ext.system.errors import install


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved("llama", equal_plan)[2], tmp_path / "model")


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    """Two formats that write a file and a folder."""

    def write_file(folder, out, *, text="a"):
        out.write_text(f"GGUF{text}")
        return ["a note"]

    def write_folder(folder, out):
        (out / "inner").mkdir(parents=True)
        (out / "inner" / "weights").write_text("b")
        return []

    def fail(folder, out):
        out.write_text("half")
        raise OSError(28, os.strerror(28))

    for name, run in {"file": write_file, "folder": write_folder, "fail": fail}.items():
        module = types.ModuleType(f"liar_ext.export.{name}_of_a_test")
        module.export = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(FORMATS, name, Format(module.__name__, "", f".{name}"))


def others(folder) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_an_export_lies_beside_its_folder_and_is_recorded(folder):
    done = export(folder, "file")
    assert done.paths == (folder.with_name("model.file"),) and done.bytes == 5
    assert done.paths[0].read_text() == "GGUFa" and others(folder) == ["model.file"]
    (entry,) = read_record(folder)
    assert entry["path"] == "../model.file" and entry["format"] == "file" and entry["bytes"] == 5
    assert len(entry["sha256"]) == 64
    # The record is a file of ours: the folder may still be overwritten.
    assert strangers(folder) == []
    export(folder, "file", folder.parent / "b.file", text="bc")
    assert [entry["options"] for entry in read_record(folder)] == [{}, {"text": "bc"}]
    assert strangers(folder) == []
    (folder / "mine.txt").write_text("mine")
    export(folder, "file", overwrite=True, text="bcd")
    assert [entry["bytes"] for entry in read_record(folder)] == [7, 6]
    assert strangers(folder) == ["mine.txt"]


def test_a_record_that_cannot_be_is_refused_and_no_pipe_is_opened(folder):
    (folder / "graph/onnx").mkdir(parents=True)
    for name in ("pipe", "graph/onnx/model.onnx"):
        os.mkfifo(folder / name)
    for kind, path, said in (
        ("gguf", "pipe", "no file and no folder"),
        ("onnx", "graph", "no file and no folder"),
        ("gguf", "a\0b", "no file and no folder"),
        ("gguf", "a" * 300, "names 'aaa.*too long"),
        (["gguf"], "pipe", "without format or path"),
        ("gguf", 3, "without format or path"),
    ):
        record = {"version": 1, "exports": [{"format": kind, "path": path}]}
        (folder / EXPORTS_FILE).write_text(json.dumps(record))
        with pytest.raises(InputError, match=said):
            read_record(folder)


def test_a_folder_that_is_not_ours_stays_as_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["liar"]
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, "file")
    assert not (folder / EXPORTS_FILE).exists()


def test_what_is_there_is_replaced_only_if_it_may_be(folder):
    for to in ("file", "folder"):
        (out,) = export(folder, to).paths
        with pytest.raises(InputError, match="exists; choose another output or overwrite"):
            export(folder, to)
        export(folder, to, overwrite=True)
    assert (out / "inner" / "weights").read_text() == "b"
    (out / "inner" / "weights").write_text("mine")
    with pytest.raises(InputError, match="holds inner/weights, which no export wrote or"):
        export(folder, "folder", overwrite=True)
    assert (out / "inner" / "weights").read_text() == "mine"
    with pytest.raises(InputError, match="which no export wrote"):
        export(folder, "file", out, overwrite=True)
    thesis = folder.with_name("thesis.txt")
    thesis.write_text("mine")
    with pytest.raises(InputError, match="is a file that no export wrote"):
        export(folder, "file", thesis, overwrite=True)
    assert thesis.read_text() == "mine"
    thesis.unlink()
    with pytest.raises(InputError, match="is a file, and the output isn't"):
        export(folder, "folder", folder.with_name("model.file"), overwrite=True)
    assert others(folder) == ["model.file", "model.folder"]


def test_a_link_is_not_followed(folder):
    victim = folder.with_name("victim")
    victim.write_text("mine")
    folder.with_name("model.file").symlink_to(victim)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="exists|no ordinary file"):
            export(folder, "file", overwrite=overwrite)
    assert victim.read_text() == "mine"


def test_a_link_to_a_folder_gives_the_export_its_name(folder, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "there" / "current"
    link.symlink_to(folder)
    assert export(link, "file").paths == (tmp_path / "there" / "current.file",)
    assert read_record(folder)[0]["path"] == "../there/current.file"
    with pytest.raises(InputError, match="lies in the folder"):
        export(link, "file", folder / "x")


def test_a_full_disk_leaves_nothing_behind(folder):
    with pytest.raises(InputError, match="No space left on device; nothing was left behind"):
        export(folder, "fail")
    assert others(folder) == [] and not (folder / EXPORTS_FILE).exists()


def test_the_folder_above_a_link_is_that_of_what_it_names(folder, tmp_path):
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    export(folder, "file", tmp_path / "link" / ".." / "x.file")
    assert (tmp_path / "elsewhere" / "x.file").exists()


@pytest.mark.parametrize("inside", ["", "x.file", "liar/x.file", ".."])
def test_an_output_in_or_around_the_folder_is_refused(folder, inside):
    with pytest.raises(InputError, match="lies in the folder|holds the folder"):
        export(folder, "file", folder / inside, overwrite=True)
    assert strangers(folder) == []


def test_what_can_not_be_exported_is_refused_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for arguments, words in {
        ("missing", "--to", "gguf"): "doesn't exist; give a model folder",
        ("file", "--to", "gguf"): "is a file; give a model folder",
        ("empty", "--to", "gguf"): "holds no readable config.json",
        ("model", "--to", "vllm", "-o", "x"): "writes nothing",
        ("model", "--to", "vllm", "--quantize", "q8_0"): "has no option quantize; it has none",
        ("model", "--to", "gguf", "-o", "/proc/x"): "can't write",
    }.items():
        place, *rest = arguments
        assert cli.main(["export", str(tmp_path / place), *rest]) == 2
        error = capsys.readouterr().err.replace("\nhint: ", "; ")
        assert words in error and error.count("\n") == 1, error
    with pytest.raises(InputError, match="has no option words; it has text"):
        export(folder, "file", words=1)
    with pytest.raises(InputError, match="to must be one of gguf"):
        export(folder, "tensorrt")
    assert others(folder) == ["empty", "file"]


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(FORMATS, "file", Format("nowhere", "", ".x", ("no_such_package",), "some"))
    with pytest.raises(InputError, match=r"no_such_package: .*; pip install '\.\[some\]'"):
        export(folder, "file")
    assert re.fullmatch(
        r"pip install 'onnx>=\S+' 'onnxscript>=\S+' 'onnxruntime>=\S+'", install("onnx")
    )


def test_a_hostile_record_is_neither_followed_nor_fatal(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    record = folder / EXPORTS_FILE
    record.write_text("[1")
    assert "keeps no record" in export(folder, "file").notes[-1]
    record.unlink()
    record.symlink_to(elsewhere / "x")
    assert "keeps no record" in export(folder, "file", overwrite=True).notes[-1]
    shutil.rmtree(record.parent)
    record.parent.symlink_to(elsewhere)
    assert "keeps no record" in export(folder, "file", overwrite=True).notes[-1]
    assert list(elsewhere.iterdir()) == []
