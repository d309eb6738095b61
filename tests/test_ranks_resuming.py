"""A job that some ranks have begun is ended by any other number of them, to the same result."""

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
from tiny import tiny, tiny_inputs

import liar_ext
from liar_ext import InputError, MomentBank, distributed
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.taps import InFlight
from liar_ext.cli.main import main
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.system.distributed import RankLost

STAGES = {
    "batch": (InFlight, "set"),
    "divergence": (DenseOutputs, "divergence"),
    "block": (LayerwiseSolver, "step"),
}
# Which ranks do the job, one after the other: their number, where one of them is killed, and which.
RELAYS = {
    "from one to three": [(1, "batch", 0), (3, "divergence", 2), (2, "block", 0), (3, "", 0)],
    "from three to one": [(3, "batch", 1), (2, "divergence", 0), (3, "block", 1), (1, "", 0)],
    "in one pass": [(2, "batch", 0), (1, "divergence", 0), (3, "", 0)],
}
ONE_PASS = {"schedule": "one-pass"}
# Name: family, dtype, choices, relay.
JOBS = {
    "default": ("llama", torch.float64, {}, "from one to three"),
    "two stacks": ("bart", torch.float32, {}, "from three to one"),
    "in groups": ("opt", torch.float32, {**ONE_PASS, "memory": 40_000}, "in one pass"),
    "experts": ("qwen3_moe", torch.float32, ONE_PASS, "in one pass"),
}


@pytest.fixture(autouse=True)
def one_thread(always_saving):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def run(name: str, checkpoint=None) -> dict[str, object]:
    """Return the plan, the weights and the errors of a job."""
    family, dtype, choices, _ = JOBS[name]
    model = tiny(family, dtype=dtype)
    data = [tiny_inputs(model, batch=3, tokens=12, seed=seed) for seed in range(7)]
    given = {"certify_on": data[5:], "checkpoint": checkpoint, **choices}
    report = liar_ext.prune(model, data[:5], keep=0.7, **given)
    return {
        "plan": {name: site.kept for name, site in report.plan.sites.items()},
        "weights": dict(model.state_dict()),
        "rows": [(r.name, r.error, r.holdout_error, r.damp, r.sensitivity) for r in report.sites],
        "certified": [row.certified_error for row in report.sites],
    }


def counted(monkeypatch, stage: str, killed: bool) -> dict[str, list]:
    """Note calls by stage; of that which is named the second one kills this process."""
    return {
        each: stop_at(monkeypatch, *at, 2 if killed and each == stage else -1, kill)
        for each, at in STAGES.items()
    }


@some("name", JOBS, "default")
def test_any_number_of_ranks_goes_on_after_a_kill(name, tmp_path, monkeypatch):
    expected, checkpoint, said = run(name), tmp_path / "c", []
    relay = RELAYS[JOBS[name][3]]
    for count, stage, victim in relay:

        def job(rank, count=count, stage=stage, victim=victim):
            with monkeypatch.context() as patch:
                calls = counted(patch, stage, rank == victim)
                distributed.join()
                try:
                    found = run(name, checkpoint)
                except RankLost:
                    assert stage
                    return 3
            assert not stage
            for what in expected:
                assert close(found[what], expected[what]), what
            counts = {each: len(found) for each, found in calls.items()}
            done = {each: sum(c[each] for c in distributed.gather(counts)) for each in STAGES}
            distributed.leave()
            if rank == 0:
                (tmp_path / "done").write_text(json.dumps(done))

        codes = forked.run(count, job, tmp_path)
        errors = [(tmp_path / f"err{rank}").read_text() for rank in range(count)]
        if stage:
            others = {code for rank, code in enumerate(codes) if rank != victim}
            assert codes[victim] == -signal.SIGKILL and others <= {3}, errors
            said.append({path.stem for path in checkpoint.iterdir()})
        else:
            assert codes == [0] * count, errors
    # What was saved by some is not done again by others.
    assert any(file.startswith("calibration") for file in said[0])
    assert any(file.startswith("sensitivities-") for file in said[1])
    if len(said) == 3:
        assert {"plan", "block-0", "layerwise-streams"} <= said[2]
        done = json.loads((tmp_path / "done").read_text())
        assert done["batch"] == 0 and done["divergence"] == 2  # the whole model, on fresh text
        blocks = len({key.rpartition(".")[0] for key in expected["plan"]})
        assert done["block"] == (blocks - 1) * relay[-1][0]


def test_the_command_that_lost_a_rank_is_resumed_by_another_number(
    llama_folder, corpus, tmp_path, monkeypatch
):
    assert main(command(llama_folder, corpus, tmp_path / "alone", "--quiet")) == 0
    monkeypatch.chdir(tmp_path)
    started = command(llama_folder, corpus, "out", "--checkpoint", "c")

    def stopped(rank):
        counted(monkeypatch, "block", rank == 1)
        return main(started)

    assert forked.run(2, stopped, tmp_path) == [3, -signal.SIGKILL]
    said = (tmp_path / "err0").read_text().splitlines()
    assert sum("error: another process of the job has ended" in line for line in said) == 1
    hint = next(line for line in said if "hint: " in line)
    assert hint.endswith("with any number of ranks; it goes on from c")
    assert not (tmp_path / "out").exists()

    def resumed(rank):
        os.chdir("/")  # as on another machine: what the job is, the first rank says
        return main(["resume", str(tmp_path / "c")])

    codes = forked.run(3, resumed, tmp_path)
    assert codes == [0] * 3, [(tmp_path / f"err{rank}").read_text() for rank in range(3)]
    shown = (tmp_path / "out0").read_text()
    assert "the plan; layerwise: 1 of " in shown and "out: saved after" in shown
    assert (tmp_path / "out1").read_text() == (tmp_path / "out2").read_text() == ""
    check_folders(tmp_path / "out", tmp_path / "alone")
    assert not (tmp_path / "c").exists()


def test_a_bank_with_sensitivities_of_which_the_first_rank_was_killed(
    llama_folder, corpus, tmp_path, monkeypatch
):
    def calibrate(bank: str, *more: str) -> list[str]:
        given = ["calibrate", str(llama_folder), "--calibration", str(corpus[0]), "--samples", "8"]
        given += ["--seq-len", "16", "--batch-size", "2", "--sensitivities", "--quiet"]
        return [*given, "--out", str(tmp_path / bank), *more]

    assert main(calibrate("alone")) == 0

    def stopped(rank):
        counted(monkeypatch, "divergence", rank == 0)
        return main(calibrate("bank", "--checkpoint", str(tmp_path / "c")))

    assert forked.run(2, stopped, tmp_path)[0] == -signal.SIGKILL
    assert not (tmp_path / "bank").exists()
    codes = forked.run(3, lambda rank: main(["resume", str(tmp_path / "c")]), tmp_path)
    assert codes == [0] * 3, [(tmp_path / f"err{rank}").read_text() for rank in range(3)]
    shown = (tmp_path / "out0").read_text()
    assert "sums over 6 of 6 batches; 1 of " in shown and " divergences" in shown
    bank, expected = (MomentBank.load(tmp_path / name) for name in ("bank", "alone"))
    assert all(close(vars(bank[name]), vars(sums)) for name, sums in expected.items())
    assert close(bank.source, expected.source)


def test_ranks_of_different_jobs_get_no_checkpoint(tmp_path):
    def job(rank):
        distributed.join()
        data = [tiny_inputs(tiny("llama"), batch=4) for _ in range(2)]
        for changed, what in (({"keep": 0.7 - rank / 10}, "keep"), ({"seed": rank}, "weights")):
            model = tiny("llama", seed=changed.get("seed", 0))
            keep = changed.get("keep", 0.7)
            with pytest.raises(InputError, match=f"rank {1 - rank} has {what} "):
                given = {"checkpoint": tmp_path / what, "schedule": "one-pass"}
                liar_ext.prune(model, data, keep=keep, **given)
        distributed.leave()

    assert forked.run(2, job, tmp_path) == [0, 0], (tmp_path / "err0").read_text()
