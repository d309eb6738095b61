"""Several processes on one job, as torchrun starts them: which there are, and what they hand over.

Every *rank* runs the same code over the same sequence of steps. What differs is the batches that it
runs and the sites that it *owns*, whose sums it holds and which it solves. Values are handed over
whole and in the order of ranks, never added on the way, so that a result depends neither on how
many ranks there are nor on which of them did what.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from liar_ext.errors import InputError, one_line

# Of a rank that hangs and doesn't end; one that ends is noticed at once. Others wait while the
# first one evaluates, or writes calibration text.
TIMEOUT = timedelta(hours=6)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
MOST_RANKS = 1 << 16  # a number beyond it is none of ranks
MOST_AT_ONCE = 1 << 30  # bytes of one message
Value = TypeVar("Value")


def launched() -> bool:
    """Tell whether torchrun started this process."""
    return all(name in os.environ for name in ENVIRONMENT)


def _whole(name: str, least: int, most: int, default: int | None = None) -> int:
    """Return the whole number of a variable of the environment, which must be in a range."""
    given = os.environ.get(name, default)
    with suppress(TypeError, ValueError):
        if least <= (number := int(given)) <= most:
            return number
    raise InputError(
        f"ranks: {name} must be a whole number from {least} to {most}, got {given!r} in the "
        f"environment; start all ranks by torchrun, or unset {', '.join(ENVIRONMENT)}"
    )


class Named(Protocol):
    """A site, of which only the name counts here."""

    name: str


Site = TypeVar("Site", bound=Named)


class RankLost(RuntimeError):
    """Another rank has ended, or can't be reached, so that this one can't go on."""


@dataclass(eq=False)
class Ranks:
    """The processes of a job, of which this is one; a job of one process is of one rank.

    Parameters
    ----------
    rank : int
        Which this is, from 0.
    count : int
        How many there are.
    here : int
        How many of them share this machine.
    started : bool
        Whether torchrun started them, be it one alone.
    store : torch.distributed.Store, optional
        What all can write into, also when a rank has ended.
    work : Counter
        What this rank has done, see :data:`liar_ext.pipeline.several.WORK`.
    """

    rank: int = 0
    count: int = 1
    here: int = 1
    started: bool = False
    store: Any = None
    work: Counter = field(default_factory=Counter)

    @classmethod
    def join(cls) -> Ranks:
        """Return the ranks that torchrun started; one where it started none.

        gloo carries what is on the CPU, nccl what is on GPUs; each rank takes the GPU of its
        ``LOCAL_RANK``, where the machine has one for each.

        Raises
        ------
        InputError
            If a variable that torchrun sets holds another thing than torchrun would have set.
        RankLost
            If another rank, or what started them, ends before all have met.
        """
        if not launched():
            return cls()
        count = _whole("WORLD_SIZE", 1, MOST_RANKS)
        rank = _whole("RANK", 0, count - 1)
        if count == 1:
            return cls(started=True)
        here, local = _whole("LOCAL_WORLD_SIZE", 1, count, 1), _whole("LOCAL_RANK", 0, count - 1, 0)
        _whole("MASTER_PORT", 0, 65_535)
        backend = "gloo"
        if torch.cuda.is_available() and torch.cuda.device_count() >= here:
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        ranks = cls(rank, count, here, True)
        with ranks._together():
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
            given = {"store": store, "rank": rank, "world_size": count, "timeout": TIMEOUT}
            dist.init_process_group(backend, **given)
            ranks.store = dist.PrefixStore("liar", store)
            ranks.store.set(f"process {rank}", f"{os.getpid()} {socket.gethostname()}")
        ranks.share(None)  # all are there
        return ranks

    @property
    def first(self) -> bool:
        """Whether this rank prints, evaluates and writes files."""
        return self.rank == 0

    def leave(self) -> None:
        """End the connection to the others."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def move(self, value: Value | None, source: int, to: int) -> Value | None:
        """Hand a value from one rank to another, where it is returned; None on all others.

        It may be anything that can be pickled; its tensors travel as they are, bit for bit, and
        arrive on a device of their kind.
        """
        if source == to:
            return value if self.rank == to else None
        if self.rank == source:
            self._each(_packed(value), lambda part: dist.send(part, to))
        elif self.rank == to:
            return self._received(lambda part: dist.recv(part, source))
        return None

    def each(self, value: Value, to: int) -> Iterator[Value]:
        """Yield the values of all ranks, in their order, at rank ``to``; nothing elsewhere.

        One of the others' is there at a time.
        """
        for source in range(self.count):
            given = self.move(value, source, to)
            if self.rank == to:
                yield given

    def broadcast(self, value: Value | None, source: int = 0) -> Value:
        """Return the value of one rank at all."""
        if self.count == 1:
            return value
        if self.rank == source:
            self._each(_packed(value), lambda part: dist.broadcast(part, source))
            return value
        return self._received(lambda part: dist.broadcast(part, source))

    def share(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in their order, at all."""
        return [self.broadcast(value, source) for source in range(self.count)]

    def post(self, name: str, value: Any) -> None:
        """Leave a value, as JSON has it, for the first rank to find; none waits for another."""
        with self._together():
            self.store.set(f"{name} of {self.rank}", json.dumps(value))

    def posted(self, name: str) -> list[Any]:
        """Return what the others have left by that name, each its last value."""
        with self._together():
            names = [f"{name} of {rank}" for rank in range(self.count) if rank != self.rank]
            return [json.loads(self.store.get(each)) for each in names if self.store.check([each])]

    def tells(self) -> bool:
        """Tell whether this rank is the one to say why the job ends: the first that asks."""
        if self.store is None:
            return True
        try:
            return self.store.add("told", 1) == 1
        except RuntimeError:  # the machine that has the store is gone
            return True

    def ended(self) -> list[str]:
        """Return which ranks of this machine have ended, each with its process, in words."""
        found = []
        for rank in range(self.count) if self.store is not None else ():
            with suppress(RuntimeError):
                process, _, host = self.store.get(f"process {rank}").decode().partition(" ")
                if host == socket.gethostname() and not _is_alive(int(process)):
                    found.append(f"rank {rank} (process {process})")
        return found

    def _each(self, parts: Sequence[Tensor], hand: Callable[[Tensor], object]) -> None:
        with self._together():
            for part in parts:
                for some in part.split(MOST_AT_ONCE) if len(part) else ():
                    hand(some)

    def _received(self, hand: Callable[[Tensor], object]) -> Any:
        size = torch.empty(1, dtype=torch.int64)
        self._each([size.view(torch.uint8)], hand)
        message = torch.empty(int(size), dtype=torch.uint8)
        self._each([message], hand)
        unpickler = _Unpickler(io.BytesIO(message.numpy().tobytes()))
        value = unpickler.load()
        self._each([_bytes(tensor) for tensor in unpickler.tensors], hand)
        return value

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say that a rank is lost, where the others don't answer."""
        try:
            yield
        except RuntimeError as error:
            said = one_line(error, 120)
            raise RankLost(f"rank {self.rank} can't reach another any more: {said}") from error


ALONE = Ranks()


@dataclass(frozen=True)
class Owners:
    """Which rank owns which site.

    Parameters
    ----------
    ranks : Ranks
        Who there is.
    of : mapping of str to int
        The owner by site name; this rank itself where a name isn't there.
    """

    ranks: Ranks = ALONE
    of: Mapping[str, int] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """Return the owner of a site."""
        return self.of.get(name, self.ranks.rank)

    def mine(self, name: str) -> bool:
        """Tell whether this rank owns a site."""
        return self.rank_of(name) == self.ranks.rank

    def together(
        self, at: Sequence[Site], compute: Callable[[Sequence[Site]], Mapping[str, Value]]
    ) -> dict[str, Value]:
        """Return at all ranks what ``compute`` gives for sites, each rank for those it owns."""
        mine = [site for site in at if self.mine(site.name)]
        found = dict(compute(mine)) if mine else {}
        if self.of:
            shares = self.ranks.share(found)
            found = {name: value for each in shares for name, value in each.items()}
        return {site.name: found[site.name] for site in at}


def deal(sizes: Sequence[int], count: int) -> list[int]:
    """Return the rank that each item goes to, in their order: the one that has least so far."""
    loads, found = [0] * count, []
    for size in sizes:
        found.append(loads.index(min(loads)))
        loads[found[-1]] += size
    return found


class _Pickler(pickle.Pickler):
    """Pickles all but tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> tuple | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().contiguous())
        return tuple(value.shape), value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Makes room for the tensors that :class:`_Pickler` collected; they are filled later."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_load(self, key: tuple) -> Tensor:
        shape, dtype, device = key
        self.tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self.tensors[-1]


def _packed(value: object) -> list[Tensor]:
    """Return a value as bytes: how many describe it, those, and its tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    message = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
    size = torch.tensor([len(message)]).view(torch.uint8)
    return [size, message, *(_bytes(tensor) for tensor in pickler.tensors)]


def _bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as a view of its bytes, which every backend can carry."""
    return tensor.reshape(-1).view(torch.uint8)


def _is_alive(process: int) -> bool:
    """Tell whether a process of this machine is there and runs; one that has ended may linger."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
