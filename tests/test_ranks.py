"""Any number of ranks gives what one process gives, to the last bit, and none is waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping

import forked
import pytest
import torch
from tiny import tiny, tiny_inputs
from torch import Tensor

import liar_ext
from liar_ext import InputError
from liar_ext.calibration.bank_file import read_bank
from liar_ext.calibration.passes import split
from liar_ext.calibration.taps import InFlight
from liar_ext.cli.main import main
from liar_ext.cli.several import check_shared
from liar_ext.ranks import RankLost, Ranks, _is_alive, deal
from liar_ext.saved.progress import Progress

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
    "rescaled": ("llama", torch.float32, 4, 0, {"rescale": True}),
    "auto": ("llama", torch.float32, 4, 2, {}),
}


def run(name: str, ranks: Ranks) -> dict[str, object]:
    """Return the plan, the weights and the errors of a job."""
    family, dtype, count, fresh, choices = JOBS[name]
    model = tiny(family, dtype=dtype)
    data = [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(count)]
    if family == "llama":  # for a loss
        data = [{**batch, "labels": batch["input_ids"]} for batch in data]
    certify = [tiny_inputs(model, batch=2, seed=90 + seed) for seed in range(fresh)] or None
    judge = [tiny_inputs(model, batch=2, seed=80 + seed) for seed in range(5)]
    given = {"certify_on": certify, "judge_on": judge if name == "auto" else None}
    report = liar_ext.prune(model, data, keep=0.7, ranks=ranks, **given, **choices)
    return {
        "plan": {name: site.kept for name, site in report.plan.sites.items()},
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "rows": [(r.name, r.error, r.holdout_error, r.damp, r.sensitivity) for r in report.sites],
        "certified": [row.certified_error for row in report.sites],
        "tokens": report.settings["calibration_tokens"],
        "measured": [report.settings.get(name) for name in MEASURED],
        "work": report.settings.get("ranks", [dict(ranks.work)]),
    }


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


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, object]]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: run(name, Ranks()) for name in JOBS}


def test_whole_models_are_measured(alone):
    """That which the ranks are compared by."""
    assert len(alone["auto"]["measured"][0]) == 2
    assert alone["rescaled"]["measured"][1] > 0


@pytest.mark.parametrize(("count", "jobs"), [(2, ["default", "one-pass"]), (3, [*JOBS])])
def test_ranks_give_what_one_gives(count, jobs, alone, tmp_path):
    def job(rank: int) -> None:
        warnings.simplefilter("ignore")
        ranks = Ranks.join()
        results = {name: run(name, ranks) for name in jobs}
        torch.save(results, tmp_path / f"results{rank}")
        ranks.leave()

    assert forked.run(count, job, tmp_path) == [0] * count, (tmp_path / "err0").read_text()
    for rank in range(count):
        results = torch.load(tmp_path / f"results{rank}")
        for name, found in results.items():
            expected = alone[name]
            compared = ["plan", "weights", "rows", "tokens", "measured"]
            if rank == 0 or JOBS[name][4].get("schedule") != "one-pass":
                compared.append("certified")  # in one pass the first rank alone measures
            for what in compared:
                assert same(found[what], expected[what]), (name, what)
            assert len(found["work"]) == count
            for what, value in expected["work"][0].items():
                # Beside what is narrowed, which every rank does alone, nothing is done twice.
                total = sum(each[what] for each in found["work"])
                # What doesn't fit into one rank may fit into several, and takes fewer passes.
                fewer = name == "in groups" and what in ("sequences", "tokens")
                assert total < value if fewer else total == value, (name, what)
            if name == "default":
                assert max(each["tokens"] for each in found["work"]) == 48 * -(-5 // count)
                assert {each["probes"] for each in found["work"]} == {6 // count}


def test_a_bank_is_the_same_and_a_checkpoint_serves_any_number(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress.__init__, "__defaults__", (lambda: 0.0,))  # saves each round
    model, expected = tiny("qwen3_moe"), tmp_path / "expected"
    liar_ext.calibrate(model, batches()).save(expected)
    checkpoint, path = tmp_path / "c", tmp_path / "bank"

    def stopped(rank: int) -> None:
        ranks = Ranks.join()
        seen, add = [], InFlight.set

        def set_and_die(self, batch):
            seen.append(batch)
            if rank == 1 and len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, batch)

        monkeypatch.setattr(InFlight, "set", set_and_die)
        with pytest.raises(RankLost):
            liar_ext.calibrate(model, batches(), checkpoint=checkpoint, ranks=ranks)
        assert rank or ranks.ended()[0].startswith("rank 1 (process ")

    codes = forked.run(3, stopped, tmp_path)
    assert codes == [0, -signal.SIGKILL, 0], (tmp_path / "err0").read_text()
    assert read_bank(checkpoint / "calibration.bank", sums=False).source["progress"] == 3

    def resumed(rank: int) -> None:
        ranks = Ranks.join()
        bank = liar_ext.calibrate(model, batches(), checkpoint=checkpoint, ranks=ranks)
        assert sum(each["sequences"] for each in ranks.share(ranks.work)) == 4 * 5
        if ranks.first:
            bank.save(path)
        ranks.leave()

    assert forked.run(2, resumed, tmp_path) == [0, 0], (tmp_path / "err0").read_text()
    assert path.read_bytes() == expected.read_bytes()
    # And one process goes on from what two have saved.
    again = liar_ext.calibrate(model, [*batches(), *batches(10)[8:]], checkpoint=checkpoint)
    assert same(again["0.attn"].gram, liar_ext.calibrate(model, batches(10))["0.attn"].gram)


def command(llama_folder, corpus, out, *more: str) -> list[str]:
    given = ["prune", str(llama_folder), "--calibration", str(corpus[0]), "--out", str(out)]
    return [*given, "--samples", "20", "--seq-len", "16", "--dtype", "float64", *more]


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *launch, *arguments], capture_output=True, text=True, env=environment
    )


def test_the_command_under_torchrun(llama_folder, corpus, tmp_path):
    evaluate = ("--eval", str(corpus[1]), "--eval-samples", "4")
    assert main(command(llama_folder, corpus, tmp_path / "alone", "--quiet", *evaluate)) == 0
    done = torchrun(
        2, "-m", "liar_ext", *command(llama_folder, corpus, tmp_path / "two", *evaluate)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": saved after") == 1  # the first rank alone speaks
    for name in ("model.safetensors", "config.json", "liar/plan.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    two, alone = (
        json.loads((tmp_path / name / "liar/report.json").read_text()) for name in ("two", "alone")
    )
    assert two["evaluation"] == alone["evaluation"]
    assert [each["sequences"] for each in two["settings"]["ranks"]] == [14, 13]  # 7 written


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
    assert done.returncode != 0 and len(said) == 1 and not out.exists(), done.stderr
    assert "rank 1 (process " in said[0] and "start the same command again" in done.stderr


def test_a_busy_rank_ends_when_it_is_told_to(llama_folder, corpus, tmp_path, monkeypatch):
    """Torchrun sends SIGTERM when a rank has ended; the others may be in the midst of something."""
    out = tmp_path / "out"

    def job(rank: int) -> int:
        def busy(self, batch):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        monkeypatch.setattr(InFlight, "set", busy)
        return main(command(llama_folder, corpus, out))

    processes = forked.start(2, job, tmp_path)
    os.waitid(os.P_PID, processes[1], os.WEXITED | os.WNOWAIT)
    os.kill(processes[0], signal.SIGTERM)
    assert forked.wait(processes) == [143, -signal.SIGKILL]
    said = (tmp_path / "err0").read_text().splitlines()[-2]  # below the progress bar
    assert said.startswith(f"error: rank 1 (process {processes[1]}) ended before the")
    assert not out.exists()


def test_a_rank_whose_launcher_ends_before_all_have_met(llama_folder, corpus, tmp_path):
    """It would wait for the others for hours."""

    def job(rank: int) -> int:
        if rank == 1:
            time.sleep(2)  # the other one waits for it, or looks for the store
            os._exit(0)
        (tmp_path / "process").write_text(str(os.getpid()))
        code = main(command(llama_folder, corpus, tmp_path / "out"))
        (tmp_path / "code").write_text(str(code))
        return code

    def launch() -> None:
        forked.start(2, job, tmp_path)
        while not (tmp_path / "process").exists():
            time.sleep(0.01)
        time.sleep(0.5)

    assert forked.end(forked.fork(launch)) == 0
    process, deadline = int((tmp_path / "process").read_text()), time.monotonic() + 60
    while _is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    said = [line for line in (tmp_path / "err0").read_text().splitlines() if "error: " in line]
    assert not _is_alive(process)
    assert len(said) == 1 and said[0].startswith("error: the ranks haven't met: ")
    assert not (tmp_path / "code").exists() and not (tmp_path / "out").exists()


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
            (["info"], "info: runs in one process"),
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
    ("name", "value", "rule"),
    [
        ("RANK", "one", "RANK must be a whole number from 0 to 1, got 'one'"),
        ("RANK", "2", "RANK must be a whole number from 0 to 1, got '2'"),
        ("WORLD_SIZE", "", "WORLD_SIZE must be a whole number from 1 to"),
        ("WORLD_SIZE", "1", "RANK must be a whole number from 0 to 0, got '1'"),
        ("WORLD_SIZE", "9" * 30, "WORLD_SIZE must be a whole number from 1 to"),
        ("MASTER_PORT", "http", "MASTER_PORT must be a whole number from 0 to 65535"),
        ("LOCAL_WORLD_SIZE", "3", "LOCAL_WORLD_SIZE must be a whole number from 1 to 2"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK must be a whole number from 0 to 1"),
    ],
)
def test_an_environment_that_torchrun_would_not_set_is_refused(
    name, value, rule, monkeypatch, capsys
):
    of_torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
    for each, given in {**of_torchrun, name: value}.items():
        monkeypatch.setenv(each, given)
    with pytest.raises(SystemExit) as ended:
        main(["info"])
    said = capsys.readouterr().err.replace("\nhint: ", "; ")
    assert ended.value.code == 2 and len(said.splitlines()) == 1
    assert said.startswith(f"error: {rule}")


def test_ranks_of_different_options_are_refused(tmp_path):
    def job(rank: int) -> None:
        options = Namespace(command="prune", keep=0.5 + rank / 4, quiet=rank > 0)
        with pytest.raises(InputError, match="same options.* has keep 0"):
            check_shared(options, Ranks.join())

    assert forked.run(2, job, tmp_path) == [0, 0], (tmp_path / "err0").read_text()


def test_ranks_of_different_models_are_refused(tmp_path):
    def job(rank: int) -> None:
        ranks = Ranks.join()
        data = batches(3)[rank:]
        with pytest.raises(InputError, match="the same text, and that of rank 1 is other"):
            liar_ext.calibrate(tiny("qwen3_moe"), data[:2], ranks=ranks)
        with pytest.raises(InputError, match="the same model, and that of rank 1 is other"):
            liar_ext.calibrate(tiny("qwen3_moe", seed=rank), batches(2), ranks=ranks)

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
        ranks = Ranks.join()
        assert same(ranks.broadcast(value if rank == 1 else None, 1), value)
        found = list(ranks.each({**value, "rank": rank}, 2))
        assert same(found, [{**value, "rank": each} for each in range(3)] if rank == 2 else [])
        assert ranks.share(rank * 10) == [0, 10, 20]
        moved = ranks.move(value if rank == 2 else None, 2, 0)
        assert same(moved, value) if rank == 0 else moved is None
        assert sum(sum(told) for told in ranks.share([ranks.tells(), ranks.tells()])) == 1
        ranks.leave()

    assert forked.run(3, job, tmp_path) == [0] * 3, (tmp_path / "err0").read_text()


def test_sites_are_dealt_to_the_rank_that_has_least():
    assert deal([5, 3, 1, 1, 4], 2) == [0, 1, 1, 1, 0]
    assert deal([5, 3, 1], 1) == [0, 0, 0]
    # No rank has more than the limit, unless an item alone does.
    sizes = [4, 4, 4, 4, 4, 9, 1]
    for bins in (1, 2, 3):
        for run_of in split(sizes, sizes, 8, bins):
            loads = [0] * bins
            for rank, size in zip(deal(run_of, bins), run_of, strict=True):
                loads[rank] += size
            assert max(loads) <= max(8, *run_of)
        assert [size for run_of in split(sizes, sizes, 8, bins) for size in run_of] == sizes
    assert len(split(sizes, sizes, 8, 2)) < len(split(sizes, sizes, 8))
