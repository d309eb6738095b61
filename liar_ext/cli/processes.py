"""The command as one of several processes, which torchrun started and ends."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from liar_ext.checkpoint_store import difference
from liar_ext.cli.messages import is_other
from liar_ext.distributed import (
    RankLost,
    broadcast,
    join,
    local_world_size,
    rank,
    world_size,
)
from liar_ext.errors import InputError

SHARED = ("prune", "calibrate", "resume")  # commands that several ranks can share
# Options of which each machine may have its own.
OWN = ("quiet", "json", "progress", "out", "bank", "checkpoint")


@contextmanager
def quietened(options: argparse.Namespace) -> Iterator[None]:
    """Let the other ranks than the first show nothing."""
    if not is_other():
        yield
        return
    from transformers.utils import logging

    options.quiet, options.json, options.progress = True, False, False
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def meet(options: argparse.Namespace) -> None:
    """Meet the other ranks; raise InputError if a command can't be shared, or options differ."""
    join()
    if world_size() == 1:
        return
    if options.command not in SHARED:
        raise InputError(
            f"{options.command}: runs in one process, and torchrun started {world_size()}; only "
            f"liar {', '.join(SHARED)} can be shared"
        )
    own = {name: each for name, each in vars(options).items() if name not in OWN}
    first = broadcast(own)
    if first != own:
        name = next(name for name in {**own, **first} if own.get(name) != first.get(name))
        raise InputError(
            f"{options.command}: every rank must have the same options, and rank 0 has "
            f"{difference(name, first.get(name), own.get(name))} at rank {rank()}"
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


def how_to_go_on(error: RankLost, options: argparse.Namespace) -> str:
    """Return the line that says that another rank is lost, and how to go on."""
    checkpoint = getattr(options, "checkpoint", None) or getattr(options, "folder", None)
    return (
        f"{error}; no output was written, start the same command again, with "
        f"any number of ranks{f'; it goes on from {checkpoint}' if checkpoint else ''}"
    )
