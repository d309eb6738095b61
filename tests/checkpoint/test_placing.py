"""A folder takes its place at once, and only what save_pruned wrote gives way."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from folders import equal_plan, make_plan, pruned

from liar_ext.checkpoint import load_model, load_pruned, placing, save_pruned, saving
from liar_ext.checkpoint.folder import MANIFEST_FILE, MARKER_FILE, strangers
from liar_ext.checkpoint.placing import check_folder
from liar_ext.system.errors import InputError


@pytest.fixture
def folder(saved, tmp_path: Path) -> Path:
    return shutil.copytree(saved()[2], tmp_path / "pruned")


def save_other(folder: Path, **settings) -> torch.nn.Module:
    model, plan = pruned("llama", equal_plan)
    save_pruned(model, folder, plan, **settings)
    return model


def test_every_file_is_in_the_manifest(folder: Path) -> None:
    listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {*listed, MANIFEST_FILE} == {str(path.relative_to(folder)) for path in files}
    assert strangers(folder) == []


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "deep/er/notes.txt"])
def test_a_file_of_the_user_is_not_deleted(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("three years of work")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=f"holds {name}, which save_pruned didn't write"):
        save_other(folder, overwrite=True)
    assert sorted(folder.rglob("*")) == before
    assert os.listdir(folder.parent) == ["pruned"]


def test_a_folder_without_a_manifest_is_not_gone_into(tmp_path: Path) -> None:
    (tmp_path / "home" / "deep").mkdir(parents=True)
    assert strangers(tmp_path) == ["home"]


def test_a_file_that_the_user_changed_is_not_deleted(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(InputError, match=r"holds model.safetensors, .* changed since"):
        check_folder(folder, overwrite=True)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(InputError, match=r"model.safetensors"):
        check_folder(folder, overwrite=True)


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": 3}', "[" * 100_000])
def test_a_damaged_manifest_proves_nothing(manifest: str, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(InputError, match=f"holds {MANIFEST_FILE}"):
        check_folder(folder, overwrite=True)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("at", ["before", "after"])
def test_an_interrupt_in_the_exchange_loses_nothing(at, atomic, folder, monkeypatch) -> None:
    """Ctrl-C between any two renames; only OSError was mended once."""
    rename, renameat2 = Path.rename, placing._renameat2
    raised = []

    def interrupted(function):
        def call(*arguments):
            if at == "after" or raised:
                result = function(*arguments)
            if not raised:
                raised.append(arguments)
                raise KeyboardInterrupt
            return result

        return call

    if atomic:
        exchange = interrupted(renameat2)
        monkeypatch.setattr(
            placing,
            "_renameat2",
            lambda a, b, f: exchange(a, b, f) if f == 2 else renameat2(a, b, f),
        )
    else:
        monkeypatch.setattr(placing, "_renameat2", lambda *arguments: False)
        monkeypatch.setattr(Path, "rename", interrupted(rename))
    with pytest.raises(KeyboardInterrupt):
        save_other(folder, overwrite=True)
    assert raised and strangers(folder) == []
    load_pruned(folder)
    monkeypatch.undo()
    save_other(folder, overwrite=True)
    assert os.listdir(folder.parent) == ["pruned"]


def leftover(folder: Path, name: str = ".pruned.0123abcd", mark: bool = True) -> Path:
    path = folder.parent / name
    path.mkdir()
    (path / "model.safetensors").write_text("half")
    if mark:
        (path / MARKER_FILE).write_text("")
    return path


def test_a_folder_in_that_of_the_dense_model_changes_nothing_of_it(llama_folder, tmp_path) -> None:
    dense = shutil.copytree(llama_folder, tmp_path / "dense")
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    for overwrite in (False, True):
        save_other(dense / "small", source=dense, overwrite=overwrite)
        assert strangers(dense / "small") == [] and load_pruned(dense / "small") is not None
    assert {path.name for path in dense.iterdir()} == {*before, "small"}
    assert all((dense / name).read_bytes() == data for name, data in before.items())
    assert load_model(dense)[0].num_parameters() > load_pruned(dense / "small").num_parameters()


def test_a_link_leads_to_its_place_or_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(Path("not", "yet"))
    save_other(tmp_path / "link")
    assert strangers(tmp_path / "not" / "yet") == [] and (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "loop", tmp_path / "loop" / "x"):
        with pytest.raises(InputError, match="can't write .*loop"):
            check_folder(place)


def test_leftovers_of_killed_runs_go_at_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    leftover(folder)
    (tmp_path / ".pruned.01234567").mkdir()  # killed before anything was written
    theirs = [leftover(folder, ".pruned.89abcdef", mark=False), leftover(folder, ".pruned.backup")]
    theirs.append(leftover(folder, ".other.0123abcd"))
    used = leftover(folder, ".pruned.aaaaaaaa")
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    check_folder(folder)
    assert sorted(tmp_path.iterdir()) == sorted([*theirs, used])
    os.close(lock)
    check_folder(folder)
    assert sorted(tmp_path.iterdir()) == sorted(theirs)


def test_a_folder_that_was_moved_aside_comes_back(folder: Path) -> None:
    (folder / MARKER_FILE).write_text("")
    folder.rename(folder.with_name(".pruned.0123abcd.old"))
    leftover(folder)
    with pytest.raises(InputError, match="exists"):
        check_folder(folder)
    assert os.listdir(folder.parent) == ["pruned"] and strangers(folder) == []
    assert not (folder / MARKER_FILE).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_while_a_run_took_is_left_alone(overwrite, tmp_path: Path, monkeypatch) -> None:
    """The slower of two runs doesn't replace the faster, nor lose its own work."""
    folder = tmp_path / "pruned"
    write_fingerprint = saving.write_fingerprint

    def meanwhile(*arguments) -> None:
        monkeypatch.undo()
        write_fingerprint(*arguments)
        model, plan = pruned("llama", make_plan)
        save_pruned(model, folder, plan, report={"run": "the faster one"})
        if overwrite:
            (folder / "notes.txt").write_text("mine")

    monkeypatch.setattr(saving, "write_fingerprint", meanwhile)
    with pytest.raises(InputError, match="has changed while this ran, and was left alone") as told:
        save_other(folder, overwrite=overwrite)
    assert json.loads((folder / "liar/report.json").read_text()) == {"run": "the faster one"}
    kept = Path(str(told.value).split("this model is in ")[1].split(";")[0])
    assert strangers(kept) == [] and sorted(tmp_path.iterdir()) == sorted([folder, kept])
    load_pruned(kept)


@pytest.mark.parametrize(
    "name", ["file/pruned", "x" * 250, "new/deep/" + "x" * 250, "\ud800", "\0"]
)
def test_a_place_that_cannot_be_written_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"save_pruned: can't write .*choose another folder"):
        check_folder(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == ["file"]


def test_no_folder_is_written_into_one_of_ours(folder: Path) -> None:
    with pytest.raises(InputError, match="lies in .* whose files are listed in its manifest"):
        check_folder(folder / "new" / "inside")
    assert strangers(folder) == []


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b" / "pruned")
    assert os.listdir(tmp_path) == []


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        save_other(tmp_path / "pruned")
    finally:
        os.umask(mask)
    files = [path for path in (tmp_path / "pruned").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640} and len(files) > 5


def test_the_report_counts_the_seconds_of_saving(tmp_path: Path) -> None:
    from liar_ext.report.report import Report

    report = Report("model", seconds={"load": 1.0, "total": 2.0})
    save_other(tmp_path / "pruned", report=report)
    written = json.loads((tmp_path / "pruned" / "liar/report.json").read_text())["seconds"]
    assert written == pytest.approx(report.seconds, rel=1e-4) and written["save"] > 0
    assert written["total"] == pytest.approx(2.0 + written["save"], rel=1e-4)


def test_a_disk_that_fills_at_the_tokenizer_is_told(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(InputError, match="tokenizer can't be saved: No space left on device"):
        save_other(tmp_path / "pruned", tokenizer=Tokenizer())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Path, "mkdir"),
        (os, "open"),
        (placing.fcntl, "flock"),
        (Path, "write_text"),
        (Path, "touch"),
        (Path, "unlink"),
        (Path, "rmdir"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_interrupt_at_any_step_leaves_no_folder(owner, name, before, tmp_path, monkeypatch):
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **named):
        calls.append(name)
        if before and len(calls) == 1:
            raise KeyboardInterrupt
        result = original(*arguments, **named)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt), placing.beside(tmp_path / "out") as path:
        with open(path / "weights", "w") as file:
            file.write("x")
    assert calls and list(tmp_path.iterdir()) == []
