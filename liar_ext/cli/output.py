"""What commands print, and how the processes of one command share it."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from liar_ext.cli.messages import is_other, log
from liar_ext.report.report import Report
from liar_ext.report.tables import BYTES
from liar_ext.system import distributed
from liar_ext.system.checkpoint_store import JOB_FILE, difference, names_in
from liar_ext.system.distributed import RankLost, broadcast, local_world_size, world_size
from liar_ext.system.environment import errors_alone
from liar_ext.system.errors import InputError, typed

HEALED = ("before", "after", "tokens", "seconds")  # what JSON says of training


def say(
    report: Report, options: argparse.Namespace, start: float, known: Sequence[str] = ()
) -> None:
    """Print what came out, and what to do with it; log it where that is asked for.

    The warnings that are ``known`` have been given before.
    """
    if getattr(options, "log", None):
        log(report, options.log, options.out)
    seconds, folder = time.perf_counter() - start, options.out
    each = BYTES.get(report.dtype, 4) / 1e6
    megabytes = {name: report.params[name] * each for name in ("before", "after")}
    found = report.loader
    load = f'{found[0]}.from_pretrained("{folder}"{found[1]})' if found else report.loading
    if options.json:
        worst = report.worst_layer()
        facts = {
            "out": folder,
            "parameters": report.params,
            "megabytes": megabytes,
            "quality": report.evaluation or None,
            "heal": {each: report.heal[each] for each in HEALED} if report.heal else None,
            "worst_layer": worst and {"name": worst.name, "error": worst.holdout_error},
            "load": load,
            "seconds": seconds,
        }
        return show(options, facts, (), report.warnings)
    if options.quiet:
        return None
    place, dense = typed(folder), report.dense_beside(folder)
    following = [
        f"liar verify {place}",
        f"liar bench {place} --against {dense}",
        f"liar report {place}",
    ]
    before, after = (f"{megabytes[name]:,.1f} MB" for name in ("before", "after"))
    lines = report.lines()
    lines.append(f"{'weights':20} {before:>15} → {after:>15}")
    lines += [f"{'load':20} {load}"]
    lines += [f"{'next' * (not at):20} {command}" for at, command in enumerate(following)]
    lines.append(f"{folder}: saved after {seconds:.0f} s")
    return show(options, {}, lines, [each for each in report.warnings if each not in known])


def show(
    options: argparse.Namespace,
    facts: Mapping[str, object],
    lines: Sequence[str],
    notes: Sequence[str] | None = None,
) -> None:
    """Print facts with ``--json``, or lines; warn of ``notes``, which the JSON has as well."""
    if options.json:
        more = {} if notes is None else {"warnings": list(notes)}
        lines = [json.dumps({**facts, **more}, indent=1, default=str)]
    if lines:
        print("\n".join(lines), flush=True)
    for note in notes or ():
        warnings.warn(note, stacklevel=2)


SHARED = ("prune", "calibrate", "heal", "resume")  # commands that several ranks can share
# Options of which each machine may have its own.
OWN = ("quiet", "json", "progress", "out", "bank", "checkpoint")


@contextmanager
def quietened(options: argparse.Namespace) -> Iterator[None]:
    """Let the other ranks than the first show nothing."""
    if not is_other():
        yield
        return
    options.quiet, options.json, options.progress = True, False, False
    with errors_alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def meet(options: argparse.Namespace) -> None:
    """Meet the other ranks; raise InputError if a command can't be shared, or options differ."""
    distributed.join()
    check_shared(options.command)
    own = {name: each for name, each in vars(options).items() if name not in OWN}
    first = broadcast(own)
    if first != own:
        raise InputError(
            f"{options.command}: every rank must have the same options, and rank 0 has "
            f"{difference('options', first, own)} at rank {distributed.rank()}"
        )


def check_shared(command: str) -> None:
    """Raise InputError if several ranks were started for a command that runs in one process."""
    if world_size() > 1 and command not in SHARED:
        raise InputError(
            f"{command}: runs in one process, and torchrun started {world_size()}; only "
            f"liar {', '.join(SHARED)} can be shared"
        )


def check_device(device: str) -> None:
    """Raise InputError unless each rank can have a model of its own on such a device."""
    if world_size() == 1:
        return
    if device == "auto":
        raise InputError(
            "load_model: --device auto spreads one model over all GPUs, and each of "
            f"{world_size()} ranks has one of its own; give --device cuda: each then takes one GPU"
        )
    if device.startswith("cuda") and torch.cuda.device_count() < local_world_size():
        raise InputError(
            f"load_model: {local_world_size()} ranks of this machine need a GPU each, and it has "
            f"{torch.cuda.device_count()}; give as many to --nproc-per-node, or --device cpu"
        )


def interrupted(options: argparse.Namespace) -> str:
    """Return the line that says so, and how to go on if a checkpoint has the job."""
    checkpoint = getattr(options, "checkpoint", None)
    has_job = checkpoint and JOB_FILE in names_in(checkpoint)
    hint = f"; liar resume {typed(checkpoint)} goes on" if has_job else ""
    return f"{options.command}: interrupted{hint}"


def how_to_go_on(error: RankLost, options: argparse.Namespace) -> str:
    """Return the line that says that another rank is lost, and how to go on."""
    command, checkpoint = options.command, getattr(options, "checkpoint", None)
    count = "as many" if command == "heal" else "any number of"  # a rank has a part of its state
    return (
        f"{error}; no output was written, start the same command again, with {count} ranks"
        f"{f'; it goes on from {checkpoint}' if checkpoint else ''}"
    )
