"""The processes of one job, as torchrun starts them: which this is, and what they exchange.

Each *rank* runs the same code. Rank r of n takes batches r, r + n, ..., and sums are all-reduced.
Sites are split by size, and results gathered. Without :func:`join` a process is the only rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from liar_ext.system.environment import TORCHRUN, launched
from liar_ext.system.errors import InputError, one_line

MEETING = timedelta(minutes=10)  # ranks meet before they load anything
AT_HAND = timedelta(seconds=15)  # torchrun's store is there before; by IPv6 and IPv4 in turn
TIMEOUT = timedelta(hours=6)  # others wait while the first one evaluates, or writes text
INTERFACE = "GLOO_SOCKET_IFNAME"  # which gloo reads
Value = TypeVar("Value")


class RankLost(RuntimeError):
    """Another rank has ended, or can't be reached, so that this one can't go on."""


# The store is one that all ranks can write into, also when one has ended.
_group = SimpleNamespace(store=None, alone=False)


def join() -> None:
    """Meet the other ranks, if torchrun started this process as one of several.

    gloo carries what is on the CPU, nccl what is on GPUs, if the machine has one for each rank.
    Raises InputError if the environment isn't torchrun's, and RankLost if a rank ends before.
    """
    if not launched():
        return
    rank, count, local, port = (
        int(text) if (text := os.environ.get(name, "0")).isdecimal() else -1
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if not (0 <= rank < count and 0 <= local < local_world_size() <= count and port >= 0):
        given = ", ".join(f"{name}={os.environ[name]!r}" for name in TORCHRUN)
        raise InputError(
            f"processes: the environment must be as torchrun sets it, got {given}; start all ranks "
            "by torchrun, or unset these"
        )
    if count == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_world_size():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    with _reached(_how_to_reach()):
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        reach = AT_HAND if of_torchrun else MEETING
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=reach)))
        store.set_timeout(MEETING)
        store.set(f"liar {rank}", "is there")
        store.wait([f"liar {each}" for each in range(count)], MEETING)
        given = {"store": store, "rank": rank, "world_size": count, "timeout": TIMEOUT}
        dist.init_process_group(backend, **given)
        _group.store = dist.PrefixStore("liar", store)
        dist.all_gather_object([None] * count, None)  # all are there


def leave() -> None:
    """End the connection to the others."""
    if world_size() > 1:
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Let the first rank do by itself what the others take no part in."""
    before, _group.alone = _group.alone, True
    try:
        yield
    finally:
        _group.alone = before


def _joined() -> bool:
    return _group.store is not None and not _group.alone and dist.is_initialized()


def world_size() -> int:
    """Return how many ranks share what is computed now."""
    return dist.get_world_size() if _joined() else 1


def local_world_size() -> int:
    """Return how many ranks torchrun started on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1") if launched() else "1"
    return int(count) if count.isdecimal() else 0


def rank() -> int:
    """Return which rank this is, from 0."""
    return dist.get_rank() if _joined() else 0


def is_first() -> bool:
    """Tell whether this rank prints, evaluates and writes files."""
    return rank() == 0


def all_reduce(*sums: Tensor) -> None:
    """Add the sums of all ranks up, in place, at all of them."""
    with _reached():
        for each in sums if world_size() > 1 else ():
            dist.all_reduce(each)


def gather(value: Value) -> list[Value]:
    """Return the values of all ranks, in their order, at all."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _reached():
        dist.all_gather_object(found, tree_map_only(Tensor, _packed, value))
    return tree_map_only(_OfGPU, _OfGPU.unpacked, found)


def broadcast(value: Value | None, source: int = 0) -> Value:
    """Return the value of one rank at all."""
    if world_size() == 1:
        return value
    found = [tree_map_only(Tensor, _packed, value) if rank() == source else None]
    with _reached():
        dist.broadcast_object_list(found, source)
    return value if rank() == source else tree_map_only(_OfGPU, _OfGPU.unpacked, found[0])


def share(
    at: Sequence[Any], compute: Callable[[Sequence[Any]], Mapping[str, Value]]
) -> dict[str, Value]:
    """Return at all ranks what ``compute`` gives for sites, each rank computing some of them.

    A site goes to the rank that has least so far, by the cube of its ``d_in``.
    """
    loads, whose = [0] * world_size(), {}
    for site in at:
        whose[site.name] = loads.index(min(loads))
        loads[whose[site.name]] += site.d_in**3
    mine = [site for site in at if whose[site.name] == rank()]
    found = compute(mine) if mine else {}
    return {name: broadcast(found.get(name), source) for name, source in whose.items()}


def tells() -> bool:
    """Tell whether this rank is the one to say why the job ends: the first that asks."""
    if _group.store is None:
        return True
    try:
        return _group.store.add("told", 1) == 1
    except RuntimeError:  # the machine that has the store is gone
        return True


@dataclass(frozen=True)
class _OfGPU:
    """A tensor on its way from a GPU to those of other ranks."""

    tensor: Tensor

    def unpacked(self) -> Tensor:
        return self.tensor.cuda()


def _packed(tensor: Tensor) -> Tensor | _OfGPU:
    tensor = tensor.detach()
    return _OfGPU(tensor.cpu()) if tensor.is_cuda else tensor


@contextmanager
def _reached(hint: str = "") -> Iterator[None]:
    """Say that a rank is lost, where the others don't answer."""
    try:
        yield
    except RuntimeError as error:
        said = "another process of the job has ended or can't be reached"
        raise RankLost(f"{said}: {one_line(error, 120)}{hint}") from error


@contextmanager
def exchanging() -> Iterator[None]:
    """Say that a rank is lost, where torch exchanges something by itself (FSDP) and it fails."""
    try:
        yield
    except RuntimeError as error:
        own = world_size() == 1 or isinstance(error, RankLost)
        if own or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        with _reached():
            raise


def _how_to_reach() -> str:
    """Return how ranks of several machines meet, unless it was said or all are on this one."""
    if INTERFACE in os.environ or str(local_world_size()) == os.environ["WORLD_SIZE"]:
        return ""
    return (
        f"; where a machine's host name isn't its address in the network, set {INTERFACE} there to "
        "the interface that leads to the others, as eth0"
    )
