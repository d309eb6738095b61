"""Any number of ranks gives what one process gives but for rounding, and none is waited for."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from datetime import timedelta
from functools import cache

import forked
import pytest
import torch
from safetensors.torch import load_file
from stopping import kill, stop_at
from tiny import tiny, tiny_inputs
from torch import Tensor
from transformers.utils.logging import get_verbosity

import liar_ext
from liar_ext import InputError, distributed
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.taps import InFlight
from liar_ext.cli.main import main, meet
from liar_ext.system.checkpoint_store import Checkpoint, facts_of
from liar_ext.system.distributed import RankLost

MEASURED = ("schedules", "divergence_rescaled")
# Name: family, dtype, batches, fresh ones, choices.
JOBS: dict[str, tuple[str, torch.dtype, int, int, dict]] = {
    "default": ("llama", torch.float64, 5, 0, {}),
    "one-pass": ("llama", torch.float64, 5, 2, {"schedule": "one-pass"}),
    "few batches": ("qwen3", torch.float32, 1, 0, {}),
    "in groups": ("opt", torch.float32, 4, 0, {"schedule": "one-pass", "memory": 40_000}),
    "norm after sum": ("bert", torch.float64, 4, 3, {}),
    "experts": ("qwen3_moe", torch.float32, 5, 2, {}),
    "two stacks": ("bart", torch.float64, 4, 0, {}),
    "repeats": ("albert", torch.float32, 4, 0, {}),
    "gradients": ("llama", torch.float32, 3, 0, {"criterion": "taylor", "schedule": "one-pass"}),
    "hidden": ("llama", torch.float32, 4, 0, {"keep_hidden": 0.75}),
    "blocks": ("llama", torch.float64, 4, 0, {"keep_blocks": 0.67}),
    "rescaled": ("llama", torch.float32, 4, 0, {"rescale": True}),
    "auto": ("llama", torch.float32, 4, 2, {}),
}
QUICK = ["default", "one-pass", "experts", "two stacks", "auto"]


def run(name: str) -> dict[str, object]:
    """Return the plan, the weights and the errors of a job."""
    family, dtype, count, fresh, choices = JOBS[name]
    model = tiny(family, dtype=dtype)
    data = [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(count)]
    if family == "llama":  # for a loss
        data = [{**batch, "labels": batch["input_ids"]} for batch in data]
    certify = [tiny_inputs(model, batch=2, seed=90 + seed) for seed in range(fresh)] or None
    judge = [tiny_inputs(model, batch=2, seed=80 + seed) for seed in range(5)]
    given = {"certify_on": certify, "judge_on": judge if name == "auto" else None}
    report = liar_ext.prune(model, data, keep=0.7, **given, **choices)
    return {
        "plan": {name: site.kept for name, site in report.plan.sites.items()},
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "rows": [(r.name, r.error, r.holdout_error, r.damp, r.sensitivity) for r in report.sites],
        "certified": [row.certified_error for row in report.sites],
        "tokens": report.settings["calibration_tokens"],
        "measured": [report.settings.get(name) for name in MEASURED],
    }


def close(a: object, b: object, scale: float = 1e-5) -> bool:
    """Tell whether two results agree within rounding: tensors to 1e-5 of their largest value."""
    if isinstance(a, Tensor):
        far = (a.double() - b.double()).abs().max() if a.shape == b.shape else math.inf
        return not a.numel() or float(far) <= scale * max(float(b.abs().max()), 1e-30)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and b is not None:
        return a == b or (a != a and b != b) or math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)
    return a == b


def check_folders(one: os.PathLike, other: os.PathLike) -> None:
    """Check that two folders have the same plan and config, and weights that agree."""
    for name in ("config.json", "liar/plan.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for path in other.glob("model*.safetensors"):
        assert close(load_file(one / path.name), load_file(path)), path.name


def same(a: object, b: object) -> bool:
    """Tell whether two results are the same, to the last bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def batches(count: int = 8) -> list[dict[str, Tensor]]:
    return [tiny_inputs(tiny("qwen3_moe"), batch=4, seed=seed) for seed in range(count)]


@cache
def alone(name: str) -> dict[str, object]:
    """Return what one process gives, that which measures whole models, too."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(name)
    assert name != "auto" or len(found["measured"][0]) == 2
    assert name != "rescaled" or found["measured"][1] > 0
    return found


@pytest.mark.parametrize(
    ("count", "jobs"),
    [
        (3, QUICK),
        pytest.param(3, sorted({*JOBS} - {*QUICK}), marks=pytest.mark.exhaustive),
        pytest.param(2, ["default", "one-pass"], marks=pytest.mark.exhaustive),
    ],
    ids=["some", "others", "two"],
)
def test_ranks_give_what_one_gives(count, jobs, tmp_path, monkeypatch):
    def job(rank: int) -> None:
        warnings.simplefilter("ignore")
        distributed.join()
        runs = stop_at(monkeypatch, InFlight, "set")
        probes = stop_at(monkeypatch, DenseOutputs, "divergence")
        results = {}
        for name in jobs:
            runs.clear(), probes.clear()
            results[name] = run(name) | {"runs": len(runs), "probes": len(probes)}
        torch.save(results, tmp_path / f"results{rank}")
        distributed.leave()

    assert forked.run(count, job, tmp_path) == [0] * count, (tmp_path / "err0").read_text()
    every = [torch.load(tmp_path / f"results{rank}") for rank in range(count)]
    for name in jobs:
        for found in every:
            for what, expected in alone(name).items():
                assert close(found[name][what], expected), (name, what)
            # All ranks have the same, to the last bit.
            for tensor, value in every[0][name]["weights"].items():
                assert torch.equal(found[name]["weights"][tensor], value), (name, tensor)
    if "default" not in jobs:
        return
    work = {what: [found["default"][what] for found in every] for what in ("runs", "probes")}
    assert sum(work["runs"]) == 5 and max(work["runs"]) == -(-5 // count)
    assert len(set(work["probes"])) == 1


def test_the_same_ranks_give_the_same_bits(tmp_path):
    def job(rank: int) -> None:
        warnings.simplefilter("ignore")
        distributed.join()
        first, again = (run("default")["weights"] for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        distributed.leave()

    assert forked.run(2, job, tmp_path) == [0, 0], (tmp_path / "err0").read_text()


def test_a_bank_agrees_and_a_checkpoint_serves_any_number(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (lambda: 0.0,))  # saves each round
    model = tiny("qwen3_moe")
    expected = liar_ext.calibrate(model, batches())
    checkpoint, path = tmp_path / "c", tmp_path / "bank"

    def stopped(rank: int) -> None:
        distributed.join()
        stop_at(monkeypatch, InFlight, "set", 2 if rank == 1 else -1, kill)
        with pytest.raises(RankLost, match="another process of the job has ended"):
            liar_ext.calibrate(model, batches(), checkpoint=checkpoint)

    codes = forked.run(3, stopped, tmp_path)
    assert codes == [0, -signal.SIGKILL, 0], (tmp_path / "err0").read_text()
    assert facts_of(checkpoint, "calibration")["batches"] == 3

    def resumed(rank: int) -> None:
        distributed.join()
        runs = stop_at(monkeypatch, InFlight, "set")
        bank = liar_ext.calibrate(model, batches(), checkpoint=checkpoint)
        assert sum(distributed.gather(len(runs))) == 5
        if distributed.is_first():
            bank.save(path)
        distributed.leave()

    assert forked.run(2, resumed, tmp_path) == [0, 0], (tmp_path / "err0").read_text()
    bank = liar_ext.MomentBank.load(path)
    assert bank.source == expected.source and torch.equal(bank.sequences, expected.sequences)
    for name, sums in expected.items():
        assert close(vars(bank[name]), vars(sums)), name
    # And one process goes on from what two have saved.
    again = liar_ext.calibrate(model, [*batches(), *batches(10)[8:]], checkpoint=checkpoint)
    assert close(again["0.attn"].gram, liar_ext.calibrate(model, batches(10))["0.attn"].gram)


def command(llama_folder, corpus, out, *more: str) -> list[str]:
    given = ["prune", str(llama_folder), "--calibration", str(corpus[0]), "--out", str(out)]
    return [*given, "--samples", "20", "--seq-len", "16", "--dtype", "float64", *more]


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *launch, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.exhaustive
def test_the_command_under_torchrun(llama_folder, corpus, tmp_path):
    evaluate = ("--eval", str(corpus[1]), "--eval-samples", "4")
    assert main(command(llama_folder, corpus, tmp_path / "alone", "--quiet", *evaluate)) == 0
    done = torchrun(
        2, "-m", "liar_ext", *command(llama_folder, corpus, tmp_path / "two", *evaluate)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": saved after") == 1  # the first rank alone speaks
    check_folders(tmp_path / "two", tmp_path / "alone")
    two, alone = (
        json.loads((tmp_path / name / "liar/report.json").read_text()) for name in ("two", "alone")
    )
    assert close(two["evaluation"], alone["evaluation"])


@pytest.mark.exhaustive
def test_a_rank_that_dies_under_torchrun(llama_folder, corpus, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, sys\n"
        "from liar_ext.calibration.taps import InFlight\n"
        "from liar_ext.cli.main import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    InFlight.set = lambda self, batch: os.kill(os.getpid(), 9)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    done = torchrun(2, str(script), *command(llama_folder, corpus, out))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(said) <= 1 and not out.exists(), done.stderr
    assert all("another process of the job has ended" in line for line in said)
    assert "SIGKILL" in done.stderr  # as torchrun reports


def test_an_error_of_one_rank_ends_all_with_its_line(llama_folder, corpus, tmp_path, monkeypatch):
    def job(rank: int) -> int:
        add = InFlight.set

        def damaged(self, batch):
            add(self, batch)
            if rank == 1:
                time.sleep(1)  # the other one waits for it
                raise InputError("calibrate: the disk of this machine is damaged; replace it")

        monkeypatch.setattr(InFlight, "set", damaged)
        return main(command(llama_folder, corpus, tmp_path / "out", "--schedule", "one-pass"))

    codes = forked.run(2, job, tmp_path)
    said = [(tmp_path / f"err{rank}").read_text() for rank in range(2)]
    assert codes[1] == 2 and codes[0] in (2, 3), said
    lines = [line for text in said for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].endswith("the disk of this machine is damaged")
    assert "hint: replace it" in "".join(said)
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_left_alone_before_all_have_met(llama_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=3))

    def job(rank: int) -> int:
        if rank == 1:
            os._exit(0)
        return main(command(llama_folder, corpus, tmp_path / "out"))

    assert forked.run(2, job, tmp_path) == [3, 0]
    said = [line for line in (tmp_path / "err0").read_text().splitlines() if "error: " in line]
    assert len(said) == 1 and said[0].startswith("error: another process of the job")
    assert not (tmp_path / "out").exists()


def test_a_rank_whose_launcher_has_ended_does_not_wait_long(monkeypatch):
    """torchrun can be killed between the start of a rank and its call of join."""
    monkeypatch.setattr(distributed, "AT_HAND", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    given = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match="has ended or can't be reached"):
        distributed.join()


def test_what_cannot_be_shared_is_refused_in_one_line(llama_folder, corpus, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    out = tmp_path / "out"

    def job(rank: int) -> int:
        lines = (
            (command(llama_folder, corpus, out, "--of", "latency"), "of latency times the model"),
            (command(llama_folder, corpus, out, "--device", "auto"), "--device auto spreads"),
            (command(llama_folder, corpus, out, "--device", "cuda"), "need a GPU each"),
            (command(llama_folder, [short], out), "the text is too short"),
            (["families"], "runs in one process"),
            (["prune", "--keep", "2"], "keep must be"),
        )
        arguments, reason = lines[int((tmp_path / "case").read_text())]
        (tmp_path / "reason").write_text(reason)
        return main(arguments)

    for case in range(6):
        (tmp_path / "case").write_text(str(case))
        codes = forked.run(2, job, tmp_path)
        errors = "".join((tmp_path / f"err{rank}").read_text() for rank in range(2))
        assert min(codes) > 0 and set(codes) <= {2, 3}, (case, errors)
        lines = [line for line in errors.splitlines() if "error:" in line]
        assert len(lines) == 1 and (tmp_path / "reason").read_text() in lines[0], errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "one"),
        ("RANK", "2"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "1"),
        ("MASTER_PORT", "http"),
        ("LOCAL_WORLD_SIZE", "3"),
        ("LOCAL_RANK", "-1"),
    ],
)
def test_an_environment_that_torchrun_would_not_set_is_refused(name, value, monkeypatch, capsys):
    of_torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
    of_torchrun |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for each, given in {**of_torchrun, name: value}.items():
        monkeypatch.setenv(each, given)
    before = get_verbosity(), list(warnings.filters)
    assert main(["families"]) == 2
    assert (get_verbosity(), list(warnings.filters)) == before  # as another rank it says less
    said = capsys.readouterr().err.replace("\nhint: ", "; ")
    assert len(said.splitlines()) == 1
    assert said.startswith("error: the environment must be as torchrun sets it, ")


def test_ranks_of_different_options_are_refused(tmp_path):
    def job(rank: int) -> None:
        options = Namespace(command="prune", keep=0.5 + rank / 4, quiet=rank > 0)
        if rank == 0:
            meet(options)
            return
        with pytest.raises(InputError, match=r"same options.* has keep 0\.5, got 0\.75 at rank 1"):
            meet(options)

    assert forked.run(2, job, tmp_path) == [0, 0], (tmp_path / "err0").read_text()


def test_ranks_of_different_models_are_refused(tmp_path):
    def job(rank: int) -> None:
        distributed.join()
        data = batches(3)[rank:]
        with pytest.raises(InputError, match="the same text, and that of rank 1 is other"):
            liar_ext.calibrate(tiny("qwen3_moe"), data[:2])
        with pytest.raises(InputError, match="the same model, and that of rank 1 is other"):
            liar_ext.calibrate(tiny("qwen3_moe", seed=rank), batches(2))

    assert forked.run(2, job, tmp_path) == [0, 0], (tmp_path / "err0").read_text()


def test_values_arrive_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(5)
    value = {
        "empty": torch.zeros(2, 0),
        "none": [None, (1, "two", float("nan"))],
        "scalar": torch.tensor(3, dtype=torch.int16),
        "strided": torch.randn(6, 5, generator=generator).t()[::2],
        **{
            str(dtype): torch.randn(7, 3, generator=generator).to(dtype)
            for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64)
        },
    }

    def job(rank: int) -> None:
        distributed.join()
        assert same(distributed.broadcast(value if rank == 1 else None, 1), value)
        for source, found in enumerate(distributed.gather({**value, "rank": rank})):
            assert same(found, {**value, "rank": source})
        told = distributed.gather([distributed.tells(), distributed.tells()])
        assert sum(map(sum, told)) == 1
        total = torch.full((3,), float(rank), dtype=torch.float64)
        distributed.all_reduce(total)
        assert total.tolist() == [3.0] * 3
        with distributed.alone():
            assert distributed.world_size() == 1 and distributed.is_first()
        assert distributed.rank() == rank
        distributed.leave()
        assert distributed.world_size() == 1

    assert forked.run(3, job, tmp_path) == [0] * 3, (tmp_path / "err0").read_text()


def test_sites_go_to_the_rank_that_has_least(tmp_path):
    sites = [Namespace(name=str(number), d_in=size) for number, size in enumerate((5, 3, 1, 1, 4))]

    def job(rank: int) -> None:
        distributed.join()
        mine = []

        def compute(some):
            mine.extend(site.name for site in some)
            return {site.name: site.d_in for site in some}

        assert distributed.share(sites, compute) == {site.name: site.d_in for site in sites}
        assert mine == (["0"], ["1", "2", "3", "4"])[rank]
        distributed.leave()

    assert forked.run(2, job, tmp_path) == [0, 0], (tmp_path / "err0").read_text()
