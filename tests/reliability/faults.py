"""Disks that fill, folders that can't be written, shards that are torn, and too little memory.

Each command must do its work, or say in one line what is wrong, exit with 2 and leave nothing
behind but the checkpoint, from which the job is finished once the fault is gone.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from liar_ext import cli
from liar_ext.reconstruction.solve import BY_BLOCKS
from reliability.outcome import Outcome, in_child
from reliability.stops import STAGES, _always_saving, _result, make_inputs

TITLE = "faults of disks, files and memory"
FULL, SHORT = 160, 8
NEW_USER, NEW_MOUNTS = 0x10000000, 0x20000
KIB = 1024
LIBC = ctypes.CDLL(None, use_errno=True)
# What a job writes, and where it may be stopped by a fault.
JOBS = {name: words for name, words in STAGES.items() if name != "save"}
SWEEP = "sweep {model} --bank {one} --keep 0.7 --schedule one-pass --damp 0.01 --out {out}"
WIDE = 1024  # channels, whose solve takes some ten MiB


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Give ``count`` faults, each kind equally often."""
    torch.set_num_threads(1)
    paths = make_inputs(work)
    whole = {stage: _whole(stage, work, paths) for stage in JOBS}
    kinds = (_full_disk, _unwritable, _torn_shard, _little_memory)
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        home = work / f"{number:04}"
        home.mkdir()
        fault = kinds[number % len(kinds)]
        start = time.monotonic()
        # What a fault is, and what came of it, are told by the child that had it.
        kind, answer, _ = in_child(lambda f=fault, h=home, d=draw: f(h, paths, whole, d))
        seconds = time.monotonic() - start
        if kind != "value":
            answer = ("", "traceback" if kind == "error" else kind, str(answer))
        call, verdict, said = answer
        case = f"{number} {fault.__name__[1:].replace('_', ' ')}: {call}"
        yield Outcome(TITLE, case, call, verdict, seconds, said)
        shutil.rmtree(home, ignore_errors=True)


def _whole(stage: str, work: Path, paths: dict[str, str]) -> bytes:
    """Return the result of a job that nothing happens to."""
    home = work / f"whole-{stage.replace(' ', '-')}"
    home.mkdir()
    code, said = _call(_words(stage, home, paths))
    assert code == 0, said
    return _result(home / "out")


def _words(stage: str, home: Path, paths: dict[str, str], *more: str) -> list[str]:
    line = JOBS.get(stage, SWEEP).format(**paths, out=home / "out")
    return [*line.split(), "--quiet", *more]


def _call(words: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said as an error."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    return code, err.getvalue()


def _judge(code: int, said: str, done: Callable[[], bool], left: list[str]) -> tuple[str, str]:
    """Return the verdict on a call: done as it must be, or refused in one line."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 0:
        return ("done", "") if done() else ("wrong answer", "not the result without the fault")
    if code != 2 or len(errors) != 1:
        return "traceback", f"exit code {code}: {said}"
    return ("left behind", f"{left}") if left else ("refused", errors[0])


def _full_disk(home: Path, paths: dict[str, str], whole: dict, draw: random.Random) -> tuple:
    """Run a job where a disk, or the size of a file, is small; then finish it with room."""
    stage = draw.choice(list(JOBS))
    size = 4 * KIB * draw.randrange(1, 48)
    disk, saved = home / "disk", stage != "merge" and draw.random() < 0.7
    disk.mkdir()
    mounted = draw.random() < 0.7 and _mount(disk, size)
    more = ["--checkpoint", str(disk / "c")] if saved else []
    before = _limit_files(size) if not mounted else None
    _always_saving()
    code, said = _call(_words(stage, disk, paths, *more))
    left = sorted(path.name for path in disk.iterdir() if path.name not in ("c", "out"))
    left += ["out"] if code and (disk / "out").exists() else []
    done = lambda: _result(disk / "out") == whole[stage]  # noqa: E731
    verdict, detail = _judge(code, said, done, left)
    call = f"{stage}, {size // KIB} KiB of {'disk' if mounted else 'a file'}" + (
        ", with a checkpoint" if saved else ""
    )
    if verdict == "refused":
        _mount(disk, 64 << 20, again=True) if mounted else _limit_files(*before)
        again = ["resume", str(disk / "c"), "--quiet"]
        begun = saved and (disk / "c" / "job.safetensors").exists()
        code, said = _call(again if begun else _words(stage, disk, paths, *more))
        if code or not done() or sorted(path.name for path in disk.iterdir()) != ["out"]:
            return call, "data lost", f"with room: exit code {code}: {said}"
    return call, verdict, detail


def _unwritable(home: Path, paths: dict[str, str], whole: dict, draw: random.Random) -> tuple:
    """Run a job whose output, or checkpoint, lies where nothing can be written."""
    stage = draw.choice([*JOBS, "sweep"])
    locked = home / "locked"
    locked.mkdir(mode=0o555)
    _drop_capabilities()
    saved = stage not in ("merge", "sweep") and draw.random() < 0.5
    where = home if saved else locked
    more = ["--checkpoint", str(locked / "c")] if saved else []
    code, said = _call(_words(stage, where, paths, *more))
    left = [str(path) for path in home.rglob("*") if path != locked]
    call = f"{stage}, {'checkpoint' if saved else 'output'} in a locked folder"
    verdict, detail = _judge(code, said, lambda: False, left)
    return call, verdict, detail


def _torn_shard(home: Path, paths: dict[str, str], whole: dict, draw: random.Random) -> tuple:
    """Run a job on a model of which a file was cut."""
    stage = draw.choice([*JOBS, "sweep"])
    model = home / "model"
    shutil.copytree(paths["model"], model)
    torn = model / "model.safetensors"
    if stage == "merge":
        torn = home / "bank"
        shutil.copy(paths["one"], torn)
    size = torn.stat().st_size
    cut = draw.choice([0, 7, draw.randrange(size), size - draw.randrange(1, 2000)])
    os.truncate(torn, cut)
    given = {**paths, "model": str(model)} | ({"one": str(torn)} if stage == "merge" else {})
    before = sorted(path.name for path in home.iterdir())
    code, said = _call(_words(stage, home, given))
    left = sorted(path.name for path in home.iterdir() if path.name not in before)
    verdict, detail = _judge(code, said, lambda: False, left)
    return f"{stage}, {torn.name} cut at {cut} of {size}", verdict, detail


def _little_memory(home: Path, paths: dict[str, str], whole: dict, draw: random.Random) -> tuple:
    """Solve a wide model with little address space, or private memory, more than there is."""
    from tiny import tiny

    from liar_ext import calibrate, prune

    schedule, allocation = draw.choice(["one-pass", "layerwise"]), draw.choice(["uniform", "curve"])
    model = tiny("llama", intermediate_size=WIDE, num_hidden_layers=1)
    data = [{"input_ids": torch.randint(3, 60, (4, 16))} for _ in range(2)]
    choices = {"keep": 0.6, "allocation": allocation, "damp": 0.01, "schedule": schedule}
    bank = calibrate(model, data)
    more = draw.randrange(0, 100) << 20
    # A file that is mapped counts into the address space, and not into private memory.
    kind, what = draw.choice([(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
    dense = copy.deepcopy(model)
    status = Path("/proc/self/status").read_text()
    size = int(status.partition(f"{what}:")[2].split()[0]) * KIB
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (size + more, limits[1]))
    said, report = "", None
    try:
        report = prune(model, data, bank=bank, **choices)
    except (MemoryError, RuntimeError) as error:
        said = str(error)
    finally:
        resource.setrlimit(kind, limits)
    call = f"{schedule}, {allocation}, {what} and {more >> 20} MiB more"
    if report is not None:
        blocked = [row.name for row in report.sites if BY_BLOCKS in row.path]
        prune(dense, data, bank=bank, **choices)
        # Without room for their workspace BLAS's products round otherwise, by blocks or not.
        same = _as_one(model, dense, 1e-4 if blocked else 1e-6)
        call += f", by blocks: {', '.join(blocked)}" if blocked else ""
        call += ", curve in a file" * any("error curve" in said for said in report.warnings)
        return call, ("done" if same else "wrong answer"), "" if same else "other weights"
    if not _as_one(model, dense, 0.0):
        return call, "data lost", "the model isn't as it was"
    named = re.match(r"\w+: out of memory( in the (solve|error curve) of 0\.|:)", said) is not None
    return call, ("refused" if named else "traceback"), said


def _as_one(model: nn.Module, other: nn.Module, tolerance: float) -> bool:
    """Tell whether two models have the same weights, but for rounding in the dtype they have."""
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(
        name == of and a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for (name, a), (of, b) in pairs
    )


def _mount(folder: Path, size: int, *, again: bool = False) -> bool:
    """Mount a small disk in memory, for this process alone; False where that isn't allowed."""
    if not again and LIBC.unshare(NEW_MOUNTS) and LIBC.unshare(NEW_USER | NEW_MOUNTS):
        return False
    private, remount = 0x44000, 0x20  # MS_PRIVATE | MS_REC, MS_REMOUNT
    if not again and LIBC.mount(b"none", b"/", None, private, None):
        return False
    options = f"size={size},mode=755".encode()
    flags = remount if again else 0
    return LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) == 0


def _limit_files(size: int, most: int | None = None) -> tuple[int, int]:
    """Let no file grow beyond a size; return the limits that there were."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1] if most is None else most))
    return before


def _drop_capabilities() -> None:
    """Give up what lets an administrator write anywhere."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    LIBC.capset(header, none)
