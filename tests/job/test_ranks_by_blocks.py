"""Several ranks by blocks write the folder of one process, but for rounding."""

from __future__ import annotations

import json
import os
import signal
import warnings

import forked
import pytest
import torch
from covers import some
from stopping import kill, stop_at
from test_ranks import check_folders, close, command
from tiny import batches, tiny

from liar_ext import distributed
from liar_ext.calibration.taps import InFlight
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.cli.main import main
from liar_ext.job.pruning import prune_folder
from liar_ext.job.state import Job
from liar_ext.job.streamed import ProbeStreams, StreamedPasses
from liar_ext.models.recipe import Recipe
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.distributed import RankLost

ONE_PASS = {"schedule": "one-pass"}
# Choices, and whether hidden states are on disk and the sums of one block there at a time.
JOBS = {
    "default": ({}, False),
    "one-pass": (ONE_PASS, False),
    "one-pass-tight": (ONE_PASS, True),
    "fewer experts": ({**ONE_PASS, "keep_experts": 0.75}, False),
    "attention": ({**ONE_PASS, "kinds": ("attn",), "criterion": "random"}, False),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    for family in ("llama", "mixtral"):
        model = tiny(family, dtype=torch.float64, tie_word_embeddings=False)
        model.save_pretrained(folder / family)
    return folder, batches(model, 7)


def run(dense, out, name: str, saved: Checkpoint | None = None):
    """Return the report of a job."""
    folder, data = dense
    choices, _ = JOBS[name]
    texts = {"evaluate_on": data[5:6]} if name != "attention" else {}
    if not choices:
        texts["certify_on"] = data[6:]
    recipe = Recipe(keep=0.6, tile=1, **choices)
    folder = folder / ("llama" if recipe.keep_experts == 1.0 else "mixtral")
    store, given = BlockStore(folder, "float64"), {"limit": 8 << 30, "saved": saved, **texts}
    return prune_folder(store, Job(store.model, data[:5], recipe, **given), out)


def numbers(report) -> list:
    """Return what a report has that doesn't depend on the clock."""
    rows = [(r.name, r.error, r.damp, r.sensitivity, r.certified_error) for r in report.sites]
    return [rows, report.evaluation, report.params, report.settings["calibration_tokens"]]


def in_json(value) -> object:
    return json.loads(json.dumps(value))


@pytest.fixture(scope="module")
def alone(dense, tmp_path_factory):
    """The folders of one process, and the numbers of its reports, by job."""
    torch.set_num_threads(1)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (_, tight) in JOBS.items():
            out = tmp_path_factory.mktemp("alone") / name
            with pytest.MonkeyPatch.context() as patch:
                if tight:
                    patch.setattr("liar_ext.job.streamed.room_for_states", lambda *_: 0)
                found[name] = out, in_json(numbers(run(dense, out, name)))
    return found


@some("count", [2, 3], 2)
def test_ranks_write_what_one_writes(count, dense, alone, tmp_path, monkeypatch):
    def job(rank):
        warnings.simplefilter("ignore")
        distributed.join()
        found, runs = {}, stop_at(monkeypatch, InFlight, "set")
        for name, (_, tight) in JOBS.items():
            with monkeypatch.context() as patch:
                if tight:
                    patch.setattr("liar_ext.job.streamed.room_for_states", lambda *_: 0)
                found[name] = numbers(run(dense, tmp_path / name, name))
        found["runs"] = distributed.gather(len(runs))
        if distributed.is_first():
            (tmp_path / "found").write_text(json.dumps(found))
        distributed.leave()

    assert forked.run(count, job, tmp_path) == [0] * count, [
        (tmp_path / f"err{rank}").read_text() for rank in range(count)
    ]
    found = json.loads((tmp_path / "found").read_text())
    for name, (out, expected) in alone.items():
        assert close(found[name], expected), name
        check_folders(tmp_path / name, out)
    # Batch by batch in every block: of five batches no rank takes more than its share.
    assert max(found["runs"]) * 5 == sum(found["runs"]) * -(-5 // count)


@pytest.mark.exhaustive
def test_the_command_by_blocks(llama_folder, corpus, tmp_path, monkeypatch):
    sizes = ["--max-memory", "8GiB", "--eval", str(corpus[1]), "--eval-samples", "4"]

    def at(out: str, *more: str) -> list[str]:
        return command(llama_folder, corpus, tmp_path / out, *sizes, *more)

    assert main(at("alone", "--quiet")) == 0

    def job(rank):
        return main(at("two"))

    codes = forked.run(2, job, tmp_path)
    assert codes == [0, 0], [(tmp_path / f"err{rank}").read_text() for rank in range(2)]
    assert (tmp_path / "out0").read_text().count(": saved after") == 1
    assert (tmp_path / "out1").read_text() == ""
    check_folders(tmp_path / "two", tmp_path / "alone")
    two, alone = (
        json.loads((tmp_path / name / "liar/report.json").read_text()) for name in ("two", "alone")
    )
    assert close(two["evaluation"], alone["evaluation"])

    def dying(rank):
        if rank:
            stop_at(monkeypatch, LayerwiseSolver, "step", 2, kill)
        return main(at("dead", "--checkpoint", str(tmp_path / "c")))

    assert forked.run(2, dying, tmp_path) == [3, -signal.SIGKILL]
    said = (tmp_path / "err0").read_text()
    assert said.count("error: another process of the job has ended") == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"alone", "two", "c"}
    assert main(["resume", str(tmp_path / "c"), "--quiet"]) == 0  # in one process
    check_folders(tmp_path / "dead", tmp_path / "alone")
    assert not (tmp_path / "c").exists()


# Which ranks do a job, one after the other: their number, the call that kills one, and which one.
SUMS, STEP = (StreamedPasses, "_sums", 2), (LayerwiseSolver, "step", 2)
READ, PROBES = (BlockStore, "tensors", 2), (ProbeStreams, "sensitivities", 1)
RELAYS = {
    "default": [(2, SUMS, 0), (3, STEP, 2), (2, None, 0)],
    "one-pass": [(3, SUMS, 1), (1, READ, 0), (3, None, 0)],
    "one-pass-tight": [(1, PROBES, 0), (2, READ, 0), (1, None, 0)],
}


@some("name", RELAYS, next(iter(RELAYS)))
def test_any_number_of_ranks_goes_on_by_blocks(name, dense, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (lambda: 0.0,))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if JOBS[name][1]:
        monkeypatch.setattr("liar_ext.job.streamed.room_for_states", lambda *_: 0)
    before, expected = alone[name]
    for count, killed, victim in RELAYS[name]:

        def job(rank, killed=killed, victim=victim):
            warnings.simplefilter("ignore")
            distributed.join()
            if killed and rank == victim:
                stop_at(monkeypatch, *killed, kill)
            with Checkpoint(tmp_path / "c") as saved:
                try:
                    report = run(dense, tmp_path / "out", name, saved)
                except RankLost:
                    return 3
            if distributed.is_first():
                (tmp_path / "found").write_text(json.dumps(numbers(report)))
            distributed.leave()
            return None

        codes = forked.run(count, job, tmp_path)
        errors = [(tmp_path / f"err{rank}").read_text() for rank in range(count)]
        if killed:
            others = {code for rank, code in enumerate(codes) if rank != victim}
            assert codes[victim] == -signal.SIGKILL and others <= {3}, errors
            assert not (tmp_path / "out").exists()
            assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
        else:
            assert codes == [0] * count, errors
    assert close(json.loads((tmp_path / "found").read_text()), expected)
    check_folders(tmp_path / "out", before)
