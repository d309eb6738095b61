"""Stop jobs of several ranks at random times, and go on with another number of ranks.

torchrun's own launcher starts the ranks, as forks of a process that has everything loaded. A rank,
or the launcher, gets a signal at a random time; when all of them have ended 1, 2 or 3 ranks go on,
are stopped again, and so on until the job is done. A launcher that is killed leaves ranks behind,
which may end the job.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import forked
import torch
from safetensors.torch import load
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from liar_ext import cli
from liar_ext.system.files import SEAL
from reliability.outcome import LIMIT, Outcome, in_child
from reliability.stops import (
    _always_saving,
    _expected,
    _look,
    _result,
    _words,
    ended_by,
    make_inputs,
)

TITLE = "ranks that are stopped"
FULL, SHORT = 56, 2
JOBS = ("walk", "calibrate", "prune", "by blocks")
TORCHRUN, RANK = "torchrun", "a rank"
STOPS = (
    (RANK, signal.SIGKILL),
    (TORCHRUN, signal.SIGKILL),
    (RANK, signal.SIGKILL),
    (TORCHRUN, signal.SIGTERM),
    (RANK, signal.SIGKILL),
    (TORCHRUN, signal.SIGINT),
)
LIBC = ctypes.CDLL(None)
PDEATHSIG = 1  # PR_SET_PDEATHSIG, which ranks that are commands don't have


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Stop jobs ``count`` times, each kind of job equally often."""
    torch.set_num_threads(1)
    paths = make_inputs(work)
    jobs = JOBS[:count]
    for at, stage in enumerate(jobs):
        yield from _stops(stage, range(at, count, len(jobs)), seed, work, paths)


def _stops(
    stage: str, numbers: range, seed: int, work: Path, paths: dict[str, str]
) -> Iterator[Outcome]:
    """Stop jobs of one kind."""
    home = work / stage.replace(" ", "-")
    home.mkdir()
    expected, seconds = _expected(stage, home, paths)
    draw = random.Random(f"{seed}/{stage}")
    for number in numbers:
        who, sent = STOPS[number // len(JOBS) % len(STOPS)]
        begun = (home / "c" / "job.safetensors").exists()
        ranks = draw.choice((1, 2, 3)) if begun else 2
        delay = draw.uniform(0.0, 2.5 * seconds)
        start = time.monotonic()
        job = _Launched(ranks, _words(stage, home, paths), work / "ranks")
        time.sleep(delay)
        job.stop(who, sent, draw)
        ended = job.wait()
        wrong = _look(home, expected, _agree) or job.wrong(who, sent)
        ends = (home / "out").exists() or not (home / "c").exists() or number == numbers[-1]
        if not wrong and ends and ended != "hang":
            wrong = _finished(stage, home, paths, expected, draw.choice((1, 2, 3)))
        case = f"{number} {stage}, {ranks} ranks, {sent.name} to {who} after {delay:.3f} s"
        verdict = "hang" if ended == "hang" else "data lost" if wrong else "done"
        yield Outcome(TITLE, case, f"ended by {ended}", verdict, time.monotonic() - start, wrong)
        if verdict != "done" or ends:
            shutil.rmtree(home)
            home.mkdir()


def _finished(stage: str, home: Path, paths: dict[str, str], expected: bytes, ranks: int) -> str:
    """Go on to the end by some ranks, 1 without torchrun; return what is wrong then."""
    again = (home / "c" / "job.safetensors").exists() or not (home / "out").exists()
    words = _words(stage, home, paths)
    if again and ranks == 1:
        kind, said, _ = in_child(lambda: cli.main(words))
        if (kind, said) != ("value", 0):
            return f"going on gave {kind} {said}"
    elif again:
        job = _Launched(ranks, words, home.parent / "ranks")
        ended = job.wait()
        if ended != "exit 0":
            return f"going on with {ranks} ranks ended by {ended}: {job.said()}"
    if not _agree(_result(home / "out"), expected):
        return "the result isn't that of a job that nobody stopped"
    left = sorted(path.name for path in home.iterdir())
    return "" if left == ["out"] or not again else f"left {left}"


def _agree(found: bytes, expected: bytes) -> bool:
    """Tell whether tensors agree within rounding, and what follows them is the same."""
    (mine, plan), (theirs, other) = map(_parsed, (found, expected))
    return (
        plan == other
        and mine.keys() == theirs.keys()
        and all(
            torch.allclose(mine[name].double(), each, 0.0, 1e-5 * float(each.abs().max()))
            for name, each in ((name, value.double()) for name, value in theirs.items())
            if each.numel() and name != SEAL
        )
    )


def _parsed(data: bytes) -> tuple[dict[str, torch.Tensor], bytes]:
    """Return the tensors that bytes begin with, and the bytes after them."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    end = start + max(each["data_offsets"][1] for n, each in header.items() if n[:2] != "__")
    return load(data[:end]), data[end:]


class _Launched:
    """A job that torchrun's launcher has started.

    Parameters
    ----------
    ranks : int
        How many there are.
    words : list of str
        The command.
    folder : Path
        What they say, and their output, go there.
    """

    def __init__(self, ranks: int, words: list[str], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.ranks, self.folder = ranks, folder
        self.process = forked.fork(lambda: self._launch(words), folder / "torchrun")

    def _launch(self, words: list[str]) -> None:
        """Be the launcher."""
        (self.folder / "launcher").write_text(str(os.getpid()))
        given = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=job"]
        given += [f"--nproc-per-node={self.ranks}", f"--log-dir={self.folder}/logs", "liar"]
        config, _, _ = config_from_args(parse_args(given))
        config.start_method = "fork"
        elastic_launch(config, _rank)(words, self.folder)

    def processes(self) -> dict[int, int]:
        """Return the processes by rank."""
        found = self.folder.glob("process[0-9]")
        return {int(path.name[-1]): int(path.read_text() or 0) for path in found}

    def stop(self, who: str, sent: signal.Signals, draw: random.Random) -> None:
        """Send a signal to the launcher, or to one of the ranks, as soon as it is there."""
        if who == TORCHRUN:
            os.kill(self.process, sent)  # not waited for yet, so that it is there
            return
        rank, deadline = draw.randrange(self.ranks), time.monotonic() + LIMIT
        while not self.processes().get(rank) and time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.002)
        process = self.processes().get(rank, 0)
        if _parent(process) == self.process:
            with suppress(ProcessLookupError):
                os.kill(process, sent)

    def wait(self) -> str:
        """Wait until the launcher and all ranks have ended; return how it ended."""
        deadline, ended = time.monotonic() + LIMIT, ""
        while time.monotonic() < deadline:
            if not ended:
                found, status = os.waitpid(self.process, os.WNOHANG)
                ended = ended_by(os.waitstatus_to_exitcode(status)) if found else ""
            if ended and not any(_parent(each) for each in self.processes().values()):
                return ended
            time.sleep(0.005)
        for process in [*self.processes().values(), *([] if ended else [self.process])]:
            if _parent(process):
                os.kill(process, signal.SIGKILL)
        if not ended:
            os.waitpid(self.process, 0)
        return "hang"

    def said(self) -> str:
        """Return what the ranks said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("said[0-9]")))

    def wrong(self, who: str, sent: signal.Signals) -> str:
        """Return what is wrong with what the ranks said; nothing if all is well."""
        said, joined = self.said(), len(list(self.folder.glob("joined[0-9]")))
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        # Without a launcher, or before they have met, nothing says which of them is to speak.
        alone = (who, sent) == (TORCHRUN, signal.SIGKILL) or joined < self.ranks
        if "Traceback" in said or len(lines) > (self.ranks if alone else 1):
            return f"{joined} of {self.ranks} ranks had met, and {len(lines)} lines came: {said}"
        return ""


def _rank(words: list[str], folder: Path) -> None:
    """Do the job of a rank; torchrun's launcher wants it to return where all is well."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # as of a command
        signal.signal(each, signal.SIG_DFL)
    _close_sockets()
    LIBC.prctl(PDEATHSIG, 0, 0, 0, 0)
    rank, launcher = os.environ["RANK"], int((folder / "launcher").read_text())
    forked.print_to(folder / f"said{rank}", folder / f"said{rank}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _always_saving()
    module = sys.modules[cli.main.__module__]
    meet = module.meet

    def met(options: argparse.Namespace) -> None:
        meet(options)
        (folder / f"joined{rank}").touch()

    module.meet = met
    path = folder / f"process{rank}"
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
    _all_forked(folder)
    code = 70
    try:
        code = cli.main(words)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            os._exit(code)
    # What calls this waits for the launcher, for good if that was killed; a command doesn't.
    threading.Thread(target=_end_after, args=(launcher,), daemon=True).start()


def _close_sockets() -> None:
    """Close those of the launcher: its store would seem to listen when it has been killed."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one that lists them
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.close(number)


def _all_forked(folder: Path) -> None:
    """Wait until the launcher has forked all ranks, or was killed before.

    Its store looks up the name of a rank that connects; a fork of that moment, unlike a command,
    has the lock of names taken for good.
    """
    count, deadline = int(os.environ["WORLD_SIZE"]), time.monotonic() + 2
    while len(list(folder.glob("process[0-9]"))) < count and time.monotonic() < deadline:
        time.sleep(0.002)


def _end_after(launcher: int) -> None:
    """End this process when the launcher has ended."""
    while os.getppid() == launcher:
        time.sleep(0.01)
    os._exit(0)


def _parent(process: int) -> int:
    """Return the parent of a process that runs; 0 of one that is not there, or has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[1])
