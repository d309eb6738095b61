"""Several ranks by blocks write the folder of one, and each reads only its share of the weights."""

from __future__ import annotations

import json
import os
import signal
import warnings

import forked
import pytest
import torch
from test_ranks import command
from tiny import batches, tiny

from liar_ext.cli.main import main
from liar_ext.pipeline.several import READ, WORK
from liar_ext.ranks import Ranks
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.walk import Walk
from liar_ext.streaming.block_store import BlockStore
from liar_ext.streaming.job import prune_folder

ONE_PASS = {"schedule": "one-pass"}
# Choices, and whether hidden states are on disk and the sums of one block there at a time.
JOBS = {
    "default": ({}, False),
    "one-pass": (ONE_PASS, False),
    "one-pass-tight": (ONE_PASS, True),
    "attention": ({**ONE_PASS, "kinds": ("attn",), "criterion": "random"}, False),
}
FILES = ("model.safetensors", "config.json", "liar/plan.json", "liar_fingerprint.safetensors")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "llama"
    model = tiny("llama", dtype=torch.float64, tie_word_embeddings=False)
    model.save_pretrained(folder)
    return folder, batches(model, 7)


class Recorded(dict):
    """The weights of a store, and how often each was read."""

    def __init__(self, weights) -> None:
        super().__init__()
        self.weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        self.setdefault(name, 0)
        self.update({name: self.get(name) + 1})
        return self.weights[name]


def run(dense, out, name: str, ranks: Ranks):
    """Return the report of a job, what each rank has done, and which weights it has read."""
    folder, data = dense
    choices, _ = JOBS[name]
    texts = {"evaluate_on": data[5:6]} if name != "attention" else {}
    if not choices:
        texts["certify_on"] = data[6:]
    store = BlockStore(folder, "float64", ranks=ranks)
    read = store._weights = Recorded(store._weights)
    recipe = Recipe(keep=0.6, tile=1, **choices)
    report = prune_folder(store, data[:5], out, recipe, max_memory=8 << 30, **texts)
    work = {what: ranks.work[what] for what in (*WORK, READ)}
    return report, ranks.share(work), ranks.share(dict(read))


def numbers(report) -> list:
    """Return what a report has that doesn't depend on the clock."""
    rows = [(r.name, r.error, r.damp, r.sensitivity, r.certified_error) for r in report.sites]
    return [rows, report.evaluation, report.params, report.settings["calibration_tokens"]]


def in_json(value) -> object:
    return json.loads(json.dumps(value))


@pytest.fixture(scope="module")
def alone(dense, tmp_path_factory):
    """The folders of one process, the numbers of its reports, and its work, by job."""
    torch.set_num_threads(1)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (_, tight) in JOBS.items():
            out = tmp_path_factory.mktemp("alone") / name
            with pytest.MonkeyPatch.context() as patch:
                if tight:
                    patch.setattr("liar_ext.streaming.job.room_for_states", lambda *_: 0)
                report, work, read = run(dense, out, name, Ranks())
            found[name] = out, in_json(numbers(report)), work[0], read[0]
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_write_what_one_writes(count, dense, alone, tmp_path, monkeypatch):
    def job(rank):
        warnings.simplefilter("ignore")
        ranks, found = Ranks.join(), {}
        for name, (_, tight) in JOBS.items():
            with monkeypatch.context() as patch:
                if tight:
                    patch.setattr("liar_ext.streaming.job.room_for_states", lambda *_: 0)
                report, *done = run(dense, tmp_path / name, name, ranks)
            found[name] = numbers(report), *done
        if ranks.first:
            (tmp_path / "found").write_text(json.dumps(found))
        ranks.leave()

    assert forked.run(count, job, tmp_path) == [0] * count, [
        (tmp_path / f"err{rank}").read_text() for rank in range(count)
    ]
    found = json.loads((tmp_path / "found").read_text())
    for name, (out, expected, before, once) in alone.items():
        shown, work, read = found[name]
        assert shown == expected, name
        for file in FILES:
            if (out / file).exists():
                assert (tmp_path / name / file).read_bytes() == (out / file).read_bytes()
        # A tensor of a block is read as often as by one process, and by one rank alone.
        for tensor, times in once.items():
            of_each = [each[tensor] for each in read if tensor in each]
            if tensor.startswith("model.layers."):
                assert of_each == [times], tensor
        assert any(tensor.startswith("model.layers.") for tensor in once)
        assert max(each["read"] for each in work) < before["read"] / 1.5
        for what in WORK:
            assert sum(each[what] for each in work) == before[what], (name, what)
            assert before[what] < 3 or max(each[what] for each in work) < before[what]


def test_the_command_by_blocks(llama_folder, corpus, tmp_path):
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
    for name in ("model.safetensors", "config.json", "liar/plan.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    two, alone = (
        json.loads((tmp_path / name / "liar/report.json").read_text()) for name in ("two", "alone")
    )
    assert two["evaluation"] == alone["evaluation"]
    assert min(each["read"] for each in two["settings"]["ranks"]) > 0

    def refused(rank):
        return main(at("kept", "--checkpoint", str(tmp_path / "c")))

    assert set(forked.run(2, refused, tmp_path)) <= {2, 3}
    said = "".join((tmp_path / f"err{rank}").read_text() for rank in range(2))
    assert said.count("liar: error") == 1 and "by --max-memory is of one process" in said

    def dying(rank):
        Walk.step = lambda *_: os.kill(os.getpid(), signal.SIGKILL) if rank else None
        return main(at("dead"))

    assert forked.run(2, dying, tmp_path) == [3, -signal.SIGKILL]
    said = (tmp_path / "err0").read_text()
    assert said.count("liar: error: prune: rank 1 (process ") == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"alone", "two"}
