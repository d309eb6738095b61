"""The command as one of several ranks, which torchrun started: who speaks, and who ends the job."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import warnings

import torch

from liar_ext.cli.messages import error_lines
from liar_ext.errors import InputError
from liar_ext.ranks import RankLost, Ranks, launched
from liar_ext.saved.progress import difference

SHARED = ("prune", "calibrate", "resume")  # commands that several ranks can share
# Options of which each machine has its own.
OWN = ("ranks", "quiet", "json", "progress", "out", "bank", "checkpoint")
INTERFACE = "GLOO_SOCKET_IFNAME"  # which gloo reads
PAUSE = 0.2  # seconds between two looks for the process that started this one
SPEAKING = threading.Lock()
PATIENCE = 2.0  # seconds; torchrun ends a rank 0.1 to 30 seconds after another has ended


def join(options: argparse.Namespace) -> Ranks:
    """Return the ranks that share the command; the others than the first are quiet from now on.

    Raises
    ------
    SystemExit
        After a line that says so: with 3 if they can't meet, with 2 if the environment doesn't say
        how.
    """
    if not launched():
        options.ranks = Ranks()
        return options.ranks
    met = threading.Event()
    threading.Thread(target=_watch_parent, args=(met, os.getppid()), daemon=True).start()
    try:
        ranks = options.ranks = Ranks.join()
    except InputError as error:
        print(error_lines(error), file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except RankLost as error:
        print(_not_met(str(error)), file=sys.stderr, flush=True)
        raise SystemExit(3) from error
    finally:
        met.set()
    if ranks.count == 1:
        return ranks
    threading.Thread(target=_watch, args=(ranks, options, _terminations()), daemon=True).start()
    if not ranks.first:
        options.quiet, options.json, options.progress = True, False, False
        warnings.simplefilter("ignore")
        from transformers.utils.logging import set_verbosity_error

        set_verbosity_error()
    return ranks


def check_shared(options: argparse.Namespace, ranks: Ranks) -> None:
    """Raise InputError if several ranks share a command of one process, or have other options."""
    if ranks.count > 1 and options.command not in SHARED:
        raise InputError(
            f"{options.command}: runs in one process, and torchrun started {ranks.count}; only "
            f"liar {', '.join(SHARED)} can be shared"
        )
    own = {name: each for name, each in vars(options).items() if name not in OWN}
    for rank, theirs in enumerate(ranks.share(own) if ranks.count > 1 else ()):
        if theirs != own:
            name = next(name for name in {**own, **theirs} if own.get(name) != theirs.get(name))
            raise InputError(
                f"{options.command}: every rank must have the same options, and rank {rank} has "
                f"{difference(name, theirs.get(name), own.get(name))} at rank {ranks.rank}"
            )


def check_device(device: str, ranks: Ranks) -> None:
    """Raise InputError unless each rank can have a model of its own on such a device."""
    if ranks.count == 1:
        return
    if device == "auto":
        raise InputError(
            "load_model: --device auto spreads one model over all GPUs, and each of "
            f"{ranks.count} ranks has one of its own; give --device cuda: each then takes one GPU"
        )
    if device.startswith("cuda") and torch.cuda.device_count() < ranks.here:
        raise InputError(
            f"load_model: {ranks.here} ranks of this machine need a GPU each, and it has "
            f"{torch.cuda.device_count()}; give as many to --nproc-per-node, or --device cpu"
        )


def what_was_lost(ranks: Ranks, options: argparse.Namespace, reason: str, patience: float) -> str:
    """Return the line that says why a job of several ranks ended, and how to go on.

    The connection of a process that ends is gone before the process is: ``patience`` is for how
    many seconds to look for one that has ended.
    """
    deadline = time.monotonic() + patience
    while not (found := ranks.ended()) and time.monotonic() < deadline:
        time.sleep(0.01)
    checkpoint = getattr(options, "checkpoint", None) or getattr(options, "folder", None)
    again = "start the same command again, with any number of ranks"
    if checkpoint:
        again += f"; it goes on from {checkpoint}"
    said = f"{' and '.join(found)} ended before the job was done" if found else reason
    return f"{said}; no output was written, {again}"


def say(ranks: Ranks, lines: str, before: str = "") -> None:
    """Print why the job ends, if no rank and no thread of this one has: whole, before any exits."""
    with SPEAKING:
        if ranks.tells():
            print(f"{before}{lines}", file=sys.stderr, flush=True)


def _watch_parent(met: threading.Event, parent: int) -> None:
    """End the process when torchrun ends before the ranks have met: they would wait for hours."""
    while not met.wait(PAUSE):
        if os.getppid() != parent:
            print(_not_met("what started the ranks ended"), file=sys.stderr, flush=True)
            os._exit(3)


def _not_met(reason: str) -> str:
    return error_lines(
        f"the ranks haven't met: {reason}; start the same command again{_how_to_reach()}"
    )


def _how_to_reach() -> str:
    """Return how ranks of several machines meet, unless it was said or all are on this one."""
    count = os.environ["WORLD_SIZE"]
    if INTERFACE in os.environ or os.environ.get("LOCAL_WORLD_SIZE", count) == count:
        return ""
    return (
        f"; where a machine's host name isn't its address in the network, set {INTERFACE} there to "
        "the interface that leads to the others, as eth0"
    )


def _terminations() -> int:
    """Return what bytes of signals can be read from, SIGTERM among them, whatever torch is at."""
    here, there = os.pipe()
    os.set_blocking(there, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    return here


def _watch(ranks: Ranks, options: argparse.Namespace, signals: int) -> None:
    """End the process when torchrun says so, which it does when another rank has ended."""
    while os.read(signals, 1)[0] != signal.SIGTERM:
        pass
    line = what_was_lost(ranks, options, "the job was stopped by SIGTERM", patience=0.0)
    say(
        ranks, error_lines(line), "" if options.quiet else "\n"
    )  # a bar may be there, and has no end
    os._exit(128 + signal.SIGTERM)
