"""`liar prune --checkpoint` and `liar resume`: stopped at any stage, the same folder comes out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from command import refused, run
from stopping import stop_at

from liar_ext import load_pruned
from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.taps import InFlight
from liar_ext.checkpoint import saving
from liar_ext.cli import calibrate, inputs, resume
from liar_ext.job import pruning
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.system.checkpoint_store import VERSION, Checkpoint

pytestmark = pytest.mark.usefixtures("always_saving")

SIZES = ["--samples", 8, "--seq-len", 32, "--batch-size", 1, "--keep", 0.7, "--certify", 4]


def same_folders(a, b) -> bool:
    ours, theirs = (load_pruned(folder).state_dict() for folder in (a, b))
    plans = [(folder / "liar/plan.json").read_text() for folder in (a, b)]
    equal = (torch.equal(value, theirs[name]) for name, value in ours.items())
    return ours.keys() == theirs.keys() and all(equal) and plans[0] == plans[1]


def test_a_job_that_was_stopped_three_times(llama_folder, corpus, tmp_path, capsys, monkeypatch):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES]
    assert run(*command, "--out", tmp_path / "whole", "--quiet") == 0
    monkeypatch.chdir(tmp_path)
    command += ["--out", "pruned", "--checkpoint", "c"]
    said = []
    for number, stage in enumerate(
        [(InFlight, "set", 4), (DenseOutputs, "divergence", 9), (LayerwiseSolver, "step", 3)]
    ):
        with monkeypatch.context() as patch:
            stop_at(patch, *stage)
            if number:  # what the model wrote is in the checkpoint
                patch.setattr(inputs, "write_sequences", lambda **_: pytest.fail("written"))
            assert run(*(command if number == 0 else ["resume", "c"])) == 130
        assert not (tmp_path / "pruned").exists()
        said.append("; ".join(resume.what_is_saved("c")))
    assert said[0] == "sums over 3 of 11 batches"
    assert said[1] == "sums over 11 of 11 batches; 8 of 12 divergences"
    assert said[2].endswith("12 of 12 divergences; the plan; layerwise: 2 of 3 blocks")
    # Another job than the one that was stopped is refused, and nothing is lost.
    for option, value in (("--keep", 0.6), ("--out", "other")):
        assert run(*command, option, value) == 2
        assert f"is of a job with {option[2:]}" in capsys.readouterr().err
    error = refused(capsys, "calibrate", *command[1:10], "--checkpoint", "c", "--out", "b")
    assert "is of a job with command prune, got calibrate; liar resume c" in error
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("resume", "../c") == 0
    shown = capsys.readouterr().out
    assert "../c: liar prune, pruned, stopped with " in shown
    assert "2 of 3 blocks; going on in" in shown and "pruned: saved after" in shown
    assert same_folders(tmp_path / "pruned", tmp_path / "whole")
    assert not (tmp_path / "c").exists()


def test_a_text_that_changed_since(llama_folder, corpus, tmp_path, capsys, monkeypatch):
    text = shutil.copy(corpus[0], tmp_path / "text.txt")
    command = ["prune", llama_folder, "--calibration", text, *SIZES, "--self-text", 0]
    with monkeypatch.context() as patch:
        stop_at(patch, DenseOutputs, "divergence", 3)
        assert run(*command, "--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c") == 130
    text.write_text(corpus[1].read_text())
    said = refused(capsys, "resume", tmp_path / "c")
    assert "calibration text" in said and "; start the job as it was, or" in said


def test_a_config_that_changed_since(llama_folder, corpus, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(llama_folder, tmp_path / "model")
    command = ["prune", model, "--calibration", corpus[0], *SIZES, "--self-text", 0]
    with monkeypatch.context() as patch:
        stop_at(patch, DenseOutputs, "divergence", 3)
        assert run(*command, "--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c") == 130
    said = (model / "config.json").read_text()
    (model / "config.json").write_text(said.replace('"silu"', '"relu"'))
    assert "is of a job with config" in refused(capsys, "resume", tmp_path / "c")
    (model / "config.json").write_text(said)
    assert run("resume", tmp_path / "c") == 0


def test_a_job_by_blocks_that_was_stopped(llama_folder, corpus, tmp_path, capsys, monkeypatch):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--schedule", "layerwise"]
    assert run(*command, "--out", tmp_path / "whole", "--quiet", "--self-text", 0) == 0
    command += ["--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c"]
    with monkeypatch.context() as patch:
        stop_at(patch, LayerwiseSolver, "step", 3)
        assert run(*command, "--max-memory", "4GiB") == 130
    assert "is of a job with max_memory 4294967296, got None" in refused(capsys, *command)
    assert run("resume", tmp_path / "c") == 0
    assert "stopped with the plan; pruning: 2 of 3 blocks" in capsys.readouterr().out
    assert same_folders(tmp_path / "pruned", tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "pruned"}


def test_a_folder_that_was_written_already_ends_its_job(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    """After a kill between writing the folder and removing the checkpoint."""
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--schedule", "one-pass"]
    command += ["--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(resume.store, "remove", lambda _: None)
        assert run(*command) == 0
    before = (tmp_path / "pruned/config.json").stat().st_mtime_ns
    assert run("resume", tmp_path / "c") == 0
    assert "was written already" in capsys.readouterr().out
    assert (tmp_path / "pruned/config.json").stat().st_mtime_ns == before
    assert not (tmp_path / "c").exists()


def test_a_kill_while_the_checkpoint_is_removed(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--preset", "fast"]
    command += ["--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c", "--quiet"]
    unlink, removed = Path.unlink, []

    def killed(path, **named):
        if path.parent.name == "c":
            if len(removed) == removals:
                raise KeyboardInterrupt
            removed.append(path.name)
        unlink(path, **named)

    removals, code = 0, 130
    while code == 130 and removals < 20:
        removals += 1
        del removed[:]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            if (tmp_path / "c/job.safetensors").exists():
                code = run("resume", tmp_path / "c")
            else:
                shutil.rmtree(tmp_path / "c", ignore_errors=True)
                shutil.rmtree(tmp_path / "pruned", ignore_errors=True)
                code = run(*command)
        assert code in (0, 130) and (tmp_path / "pruned").exists(), capsys.readouterr().err
    assert code == 0 and removals > 3 and not (tmp_path / "c").exists()


def test_a_disk_that_fills_while_the_folder_is_saved_costs_no_work(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--quiet"]
    assert run(*command, "--out", tmp_path / "whole") == 0

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_fingerprint", full)
        command += ["--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c"]
        assert run(*command) == 2
    assert "No space left on device\nhint: nothing was left behind" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_at(patch, LayerwiseSolver, "step", 1)  # no block is solved again
        assert run("resume", tmp_path / "c", "--quiet") == 0
    assert same_folders(tmp_path / "pruned", tmp_path / "whole")


def test_a_job_that_is_refused_leaves_no_checkpoint(llama_folder, corpus, tmp_path, capsys):
    command = ["prune", llama_folder, "--calibration", corpus[0], "--checkpoint", tmp_path / "c"]
    command += ["--out", tmp_path / "pruned", "--samples", 8, "--seq-len", 32]
    assert run(*command, "--keep", 0.001) == 2
    assert "keep" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(*command, "--of", "latency") == 2
    assert "leave it or --checkpoint out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    assert run(*command, "--checkpoint", tmp_path / "mine") == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_what_a_killed_writer_left_is_no_file_of_others(llama_folder, corpus, tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("job.safetensors", "block-1.safetensors"):
        (tmp_path / "c" / f".{name}.{'0' * 16}.part").write_text("{")
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--preset", "fast"]
    command += ["--out", tmp_path / "pruned", "--checkpoint", tmp_path / "c", "--quiet"]
    assert run(*command) == 0
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"options": {"bank": None, "out": 3, "max_memory": None, "heal": None}},
            "out must be of type str",
        ),
        ({"folder": "a\0b"}, "folder must be text, not empty and without NUL"),
        (
            {"options": {"bank": None, "out": "\ud800", "max_memory": None, "heal": None}},
            "out must be UTF-8",
        ),
        ({"recipe": {"model": None}}, "it names no model"),
        ({"recipe": {"model": "a\0b"}}, "without NUL"),
    ],
)
def test_a_job_that_cannot_be_is_refused_in_one_line(changes, said, tmp_path, capsys):
    own = {"bank": None, "out": "p", "max_memory": None, "heal": None}
    job = {"version": VERSION, "command": "prune", "folder": "/", "recipe": {}, "options": own}
    with Checkpoint(tmp_path) as saved:
        saved.put("job", facts=job | changes)
    error = refused(capsys, "resume", tmp_path)
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["job", "written", "calibration"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(
    name, llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--out", tmp_path / "p"]
    with monkeypatch.context() as patch:
        stop_at(patch, InFlight, "set", 4)
        assert run(*command, "--checkpoint", tmp_path / "c") == 130
    path = tmp_path / "c" / f"{name}.safetensors"
    path.unlink()
    os.mkfifo(path)
    said = "is no job of this version" if name == "job" else "must be an ordinary file"
    assert said in refused(capsys, "resume", tmp_path / "c", "--quiet")
    assert not (tmp_path / "p").exists()


def test_a_checkpoint_of_another_version_is_refused(llama_folder, corpus, tmp_path, capsys):
    folder = tmp_path / "c"
    with Checkpoint(folder) as saved:
        saved.put("job", facts={"version": 0})
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--out", tmp_path / "p"]
    error = refused(capsys, *command, "--checkpoint", folder, "--quiet")
    assert "of another version of liar_ext; remove it and start the job again" in error
    assert "is no job of this version: version must be" in refused(capsys, "resume", folder)


@pytest.mark.parametrize("name", ["prune", "calibrate"])
def test_a_checkpoint_in_use_is_refused_before_a_model_is_read(name, corpus, tmp_path, capsys):
    """A model that isn't there would be the first to be missed; and what is new is gone again."""
    command = [name, tmp_path / "no-model", "--calibration", corpus[0], "--out", tmp_path / "p"]
    command += ["--checkpoint", tmp_path / "c"]
    with Checkpoint(tmp_path / "c"):
        assert "another process works in" in refused(capsys, *command)
    (tmp_path / "c/.lock").unlink()
    assert "no-model doesn't exist" in refused(capsys, *command)
    assert not (tmp_path / "c").exists()


def test_the_lock_of_a_checkpoint_follows_no_link(llama_folder, corpus, tmp_path, capsys):
    own = tmp_path / "own"
    own.write_text("mine")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/.lock").symlink_to(own)
    command = ["prune", llama_folder, "--calibration", corpus[0], *SIZES, "--out", tmp_path / "p"]
    error = refused(capsys, *command, "--checkpoint", tmp_path / "c")
    assert "error: can't write into" in error and own.read_text() == "mine"


def test_only_files_of_the_job_are_removed_with_its_checkpoint(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    """And nothing is overwritten because a checkpoint says so."""
    command = ["calibrate", llama_folder, "--calibration", corpus[0], *SIZES[:6]]
    assert run(*command, "--out", tmp_path / "b", "--quiet") == 0
    command += ["--out", tmp_path / "b", "--checkpoint", tmp_path / "c", "--overwrite"]
    with monkeypatch.context() as patch:
        stop_at(patch, InFlight, "set", 4)
        assert run(*command) == 130
    theirs = ["model.safetensors", "my.bank", "calibration-mine.bank", "notes.txt"]
    for name, source in zip(theirs, (llama_folder / theirs[0], tmp_path / "b"), strict=False):
        shutil.copy(source, tmp_path / "c" / name)
    shutil.copy(tmp_path / "b", tmp_path / "c" / theirs[2])
    (tmp_path / "c" / theirs[3]).write_text("")
    before = (tmp_path / "b").stat()
    assert "exists; give another name with --out, or --overwrite" in refused(
        capsys, "resume", tmp_path / "c"
    )
    assert os.path.samestat(before, (tmp_path / "b").stat())
    assert run("resume", tmp_path / "c", "--overwrite") == 0
    assert not os.path.samestat(before, (tmp_path / "b").stat())
    assert sorted(os.listdir(tmp_path / "c")) == sorted(theirs)


@pytest.mark.parametrize(("checkpoint", "result"), [("x", "x"), ("x/ck", "x"), ("x", "x/y/b")])
def test_a_checkpoint_and_a_result_in_one_place_are_refused_at_once(
    checkpoint, result, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x/y").mkdir(parents=True)
    if result == "x":
        (tmp_path / "x/y").rmdir()
        (tmp_path / "x").rmdir()
    here = ["--calibration", "t.txt", "--checkpoint", tmp_path / checkpoint]
    for command in ("calibrate", "prune"):
        error = refused(capsys, command, "/m", "--out", result, *here)
        assert f"and --out {result} must not lie one in the other" in error


@pytest.mark.parametrize("kind", ["folder", "file", "link", "pipe"])
@pytest.mark.parametrize("command", ["prune", "calibrate"])
def test_what_appears_in_the_place_of_a_result_costs_no_work(
    command, kind, llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    place = tmp_path / "result"
    put = {
        "folder": place.mkdir,
        "file": place.touch,
        "link": lambda: place.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(place),
    }
    more = ["--keep", 0.7, "--preset", "fast"] if command == "prune" else []
    of, name = (pruning, "fill_folder") if command == "prune" else (calibrate, "save_bank")
    work = getattr(of, name)

    def meanwhile(*given, **more):
        put[kind]()
        return work(*given, **more)

    monkeypatch.setattr(of, name, meanwhile)
    arguments = [llama_folder, "--calibration", corpus[0], *SIZES[:6], *more, "--out", place]
    error = refused(capsys, command, *arguments)
    (kept,) = (path for path in tmp_path.iterdir() if path != place)
    assert f"is in {kept}; {place} has changed while this ran" in error
    assert load_pruned(kept) if command == "prune" else MomentBank.load(kept)


def test_a_folder_that_appears_before_the_result_is_written_costs_no_work(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    job = pruning.run

    def meanwhile(*given, **more):
        (tmp_path / "result").mkdir()
        return job(*given, **more)

    monkeypatch.setattr(pruning, "run", meanwhile)
    arguments = [llama_folder, "--calibration", corpus[0], *SIZES[:8], "--preset", "fast"]
    error = refused(capsys, "prune", *arguments, "--out", tmp_path / "result")
    (kept,) = (path for path in tmp_path.iterdir() if path.name != "result")
    assert f"this model is in {kept}" in error and load_pruned(kept)
