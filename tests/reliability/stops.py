"""Kill jobs at random times and go on: each ends in the result of a job that nobody stopped.

A child, forked from a process that has everything loaded, runs a command; it gets SIGKILL, SIGINT
or SIGTERM at a random time of a job, and the next child goes on by ``liar resume``, is stopped
again, and so on until the job is done. After every stop the output must be absent or whole, and
every file of the checkpoint whole.
"""

from __future__ import annotations

import operator
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import torch

from liar_ext import cli
from liar_ext.checkpoint.folder import strangers
from liar_ext.system.checkpoint_store import Checkpoint
from liar_ext.system.files import is_sealed
from reliability.outcome import LIMIT, Outcome, in_child

TITLE = "jobs that are stopped"
FULL, SHORT = 300, 6
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
SIZES = "--samples 8 --seq-len 16 --batch-size 2"
CURVE = f"--keep 0.6 --tile 1 --damp 0.01 {SIZES}"
# Each stage: the command; {model}, {text} and the banks {one}, {two} are inputs, {out} the output.
STAGES = {
    "calibrate": f"calibrate {{model}} --calibration {{text}} {SIZES} --sensitivities "
    "--out {out}",
    "prune": f"prune {{model}} --calibration {{text}} --schedule one-pass {CURVE} --out {{out}}",
    "walk": f"prune {{model}} --calibration {{text}} --allocation uniform {CURVE} --out {{out}}",
    "by blocks": f"prune {{model}} --calibration {{text}} --max-memory 4GiB {CURVE} --out {{out}}",
    "save": "prune {model} --bank {one} --schedule one-pass --keep 0.6 --tile 1 --damp 0.01 "
    "--allocation uniform --out {out}",
    "merge": "merge {one} {two} -o {out}",
}


def make_inputs(work: Path) -> dict[str, str]:
    """Write a model, its text and two banks; return their paths by name."""
    from folders import tokenizer
    from tiny import tiny

    paths = {name: str(work / name) for name in ("model", "text.txt", "one", "two")}
    tiny("llama").save_pretrained(paths["model"])
    tokenizer().save_pretrained(paths["model"])
    words = random.Random(0).choices("ab", k=4000)
    Path(paths["text.txt"]).write_text(" ".join(words))
    Path(work, "more.txt").write_text(" ".join(words[::-1] + ["a"] * 40))
    for bank, text in (("one", "text.txt"), ("two", "more.txt")):
        command = f"calibrate {paths['model']} --calibration {work / text} {SIZES} --out"
        assert cli.main([*command.split(), paths[bank], "--quiet"]) == 0
    return {**paths, "text": paths["text.txt"]}


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Stop jobs ``count`` times, each stage equally often."""
    torch.set_num_threads(1)
    paths = make_inputs(work)
    for stage in STAGES:
        yield from _stops(stage, count // len(STAGES), seed, work, paths)


def _stops(
    stage: str, count: int, seed: int, work: Path, paths: dict[str, str]
) -> Iterator[Outcome]:
    """Stop jobs of one stage."""
    home = work / stage.replace(" ", "-")
    home.mkdir()
    expected, seconds = _expected(stage, home, paths)
    draw = random.Random(f"{seed}/{stage}")
    for number in range(count):
        sent = SIGNALS[number % 3]
        delay = draw.uniform(0.0, 1.5 * seconds)
        start = time.monotonic()
        before = _parts(home)
        ended = _stopped(stage, home, paths, delay, sent)
        wrong = _look(home, expected)
        if sent is signal.SIGINT and _parts(home) - before:
            wrong = f"an interrupt left {_parts(home) - before}"
        if ended not in ("exit 0", "exit 130", "signal 9", "signal 15"):
            wrong = f"it ended by {ended}: {(work / 'said').read_text()}"
        ends = (home / "out").exists() or not (home / "c").exists() or number == count - 1
        if not wrong and ends:
            wrong = _finished(stage, home, paths, expected)
        case = f"{number} {stage}, {sent.name} after {delay:.3f} s"
        verdict = "done" if not wrong else ("hang" if ended == "hang" else "data lost")
        yield Outcome(TITLE, case, f"ended by {ended}", verdict, time.monotonic() - start, wrong)
        if wrong or ends:
            shutil.rmtree(home)
            home.mkdir()


def _words(stage: str, home: Path, paths: dict[str, str]) -> list[str]:
    """Return the command that starts a job, or goes on with it."""
    if (home / "c" / "job.safetensors").exists():
        return ["resume", str(home / "c"), "--quiet"]
    words = STAGES[stage].format(**paths, out=home / "out").split()
    return [*words, "--quiet", *([] if stage == "merge" else ["--checkpoint", str(home / "c")])]


def _expected(stage: str, home: Path, paths: dict[str, str]) -> tuple[bytes, float]:
    """Return the result of a job that nobody stops, without a checkpoint, and its seconds."""
    words = [word for word in _words(stage, home, paths) if word != str(home / "c")]
    kind, code, seconds = in_child(
        lambda: cli.main([word for word in words if word != "--checkpoint"])
    )
    assert (kind, code) == ("value", 0), code
    result = _result(home / "out")
    shutil.rmtree(home)
    home.mkdir()
    return result, seconds


def _result(out: Path) -> bytes:
    """Return what must be the same: the bytes of a bank, or weights and plan of a folder."""
    if out.is_file():
        return out.read_bytes()
    return b"".join((out / name).read_bytes() for name in ("model.safetensors", "liar/plan.json"))


def _look(home: Path, expected: bytes, same: Callable[[bytes, bytes], bool] = operator.eq) -> str:
    """Return what is wrong with what a stop has left; nothing if all is well."""
    out, checkpoint = home / "out", home / "c"
    if out.exists() and not same(_result(out), expected):
        return "the output isn't that of a job that nobody stopped"
    if out.is_dir() and strangers(out):
        return f"the output has {strangers(out)}"
    for path in checkpoint.glob("[!.]*"):
        if not is_sealed(path):
            return f"{path.name} is torn"
    return ""


def _parts(home: Path) -> set[str]:
    """Return the names of unfinished files, and of unfinished folders."""
    return {path.name for path in home.rglob(".*") if path.name != ".lock"}


def _finished(stage: str, home: Path, paths: dict[str, str], expected: bytes) -> str:
    """Go on to the end; return what is wrong then."""
    again = (home / "c" / "job.safetensors").exists() or not (home / "out").exists()
    if again:
        kind, said, _ = in_child(lambda: cli.main(_words(stage, home, paths)))
        if (kind, said) != ("value", 0):
            return f"going on gave {kind} {said}"
    if _result(home / "out") != expected:
        return "the result isn't that of a job that nobody stopped"
    left = sorted(path.name for path in home.iterdir())
    return "" if left == ["out"] or not again else f"left {left}"


def _stopped(
    stage: str, home: Path, paths: dict[str, str], delay: float, sent: signal.Signals
) -> str:
    """Run a job, or go on with it, and stop it after some time; return how it ended."""
    words = _words(stage, home, paths)

    def job() -> int:
        _always_saving()
        return cli.main(words)

    child = forked.fork(job, home.parent / "said")
    time.sleep(delay)
    os.kill(child, sent)
    return ended_by(forked.end(child, LIMIT))


def ended_by(code: int | None) -> str:
    """Return how a process ended, in words."""
    return "hang" if code is None else f"signal {-code}" if code < 0 else f"exit {code}"


def _always_saving() -> None:
    """Save whatever is done, so that stops hit that."""
    Checkpoint.__init__.__defaults__ = (lambda: 0.0,)
