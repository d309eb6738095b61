"""The progress of a job in the folder of a checkpoint: tensors and facts by name, a file each.

Of several ranks the first one alone reads and writes it, and hands the others what it reads. The
files do not depend on the number of ranks: any other can go on from them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liar_ext.distributed import broadcast, gather, is_first, rank
from liar_ext.errors import InputError, one_line
from liar_ext.saved.tensor_file import SEAL, Entry, is_sealed, write_tensors

LOCK_FILE, SUFFIX, STAMP = ".lock", ".safetensors", "job"
SHARE = 0.05  # of the time that saving under one name may take


class Held(Protocol):
    """What gives a tensor when it is asked for, such as hidden states that lie on disk."""

    shape: torch.Size
    dtype: torch.dtype

    def get(self) -> Tensor:
        """Return it."""


class Kept:
    """What was put under a name; a tensor is read when it is asked for, by all ranks at once."""

    def __init__(self, path: Path) -> None:
        self.path, known = path, None
        if is_first():
            with _reading(path):
                if not path.is_file():
                    raise ValueError("it must be an ordinary file")
                if not is_sealed(path):
                    raise ValueError("its bytes are not those that were written")
                self._file = safe_open(os.fspath(path), framework="pt").__enter__()
                names = [name for name in self._file.keys() if name != SEAL]
                known = names, json.loads(self._file.metadata()["facts"])
        self._names, self.facts = broadcast(known)

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, at every rank."""
        found = None
        if is_first():
            with _reading(self.path):
                found = self._file.get_tensor(name)
        return broadcast(found)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of them."""
        return {name: self.tensor(name) for name in self.names()}


class Progress(AbstractContextManager):
    """The checkpoint of one job: whoever does a part of it puts there what is done, by name.

    What is put is there whole or not at all, whenever the process ends, and stays until something
    else is put under its name. Reading, :meth:`begin` and :meth:`put_shared` are for all ranks at
    once; in what else is called all but the first do nothing.

    Parameters
    ----------
    folder : path
        It is made if it isn't there; one process at a time works in it.
    clock : callable
        Seconds.

    Raises
    ------
    InputError
        If no files can be written there, or another process does.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.clock = Path(folder), clock
        self._start, self._lock = clock(), None
        # When it was saved, and how long that took, by name.
        self._saved: dict[str, tuple[float, float]] = {}
        if is_first():
            self._take()

    def _take(self) -> None:
        """Make the folder and have it alone."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A link would lead to somebody else's file.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(self.folder / LOCK_FILE, flags, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"checkpoint: another process works in {self.folder}; wait for it, or name another "
                "folder"
            ) from None
        except (OSError, ValueError) as error:
            raise self._refusal(error, "name another folder") from error

    def due(self, name: str) -> bool:
        """Tell whether it is time to save under a name again: that takes a twentieth at most."""
        if not is_first():
            return False
        saved, took = self._saved.get(name, (self._start, 0.0))
        return self.clock() - saved >= took / SHARE

    @contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """Count the time of saving under a name; give the path of its file but for the suffix."""
        start = self.clock()
        yield self.folder / name
        end = self.clock()
        self._saved[name] = end, end - start

    def put(
        self,
        name: str,
        tensors: Mapping[str, Tensor | Held] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Put tensors and facts under a name, in the place of what is there.

        Of what is ``Held`` one tensor at a time is in memory. A fact ``said`` is for people to
        read.

        Raises
        ------
        InputError
            If it can't be written; what was there before is there still.
        """
        if not is_first():
            return
        entries = [
            Entry(key, value.dtype, tuple(value.shape), lambda value=value: [_tensor_of(value)])
            for key, value in (tensors or {}).items()
        ]
        entries.sort(key=lambda each: -each.dtype.itemsize)
        with self.saving(name):
            try:
                metadata = {"facts": json.dumps(dict(facts or {}))}
                write_tensors(self.path(name), entries, metadata)
            except OSError as error:
                advice = "free space, and liar resume goes on from what was saved before"
                raise self._refusal(error, advice) from error

    def put_shared(
        self, name: str, tensors: Mapping[str, Tensor | Held], facts: Mapping[str, Any]
    ) -> None:
        """Put tensors of which each rank has some; the first one gets them as it writes them.

        They lie in the order of their names, whoever has them.
        """
        own = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        whose = {
            key: _Elsewhere(source, *kind)
            for source, share in enumerate(gather(own))
            for key, kind in share.items()
        }
        order = sorted(whose, key=lambda key: (-whose[key].dtype.itemsize, key))
        if is_first():
            self.put(name, {key: tensors.get(key, whose[key]) for key in order}, facts)
            return
        for key in order:
            if whose[key].source:
                own = whose[key].source == rank()
                broadcast(_tensor_of(tensors[key]) if own else None, whose[key].source)

    def get(self, name: str) -> Kept | None:
        """Return what was put under a name, if anything was.

        Raises
        ------
        InputError
            If its file is damaged.
        """
        path = self.path(name)
        return Kept(path) if broadcast(path.exists()) else None

    def need(self, name: str) -> Kept:
        """Return what was put under a name, which must be there."""
        known = self.get(name)
        if known is None:
            raise InputError(
                f"checkpoint: {self.path(name)} is missing, and later files need it; remove the "
                "folder and start the job again"
            )
        return known

    def drop(self, prefix: str) -> None:
        """Remove what has this name, or this name with an ending, banks included."""
        own = re.compile(re.escape(prefix) + r"(-\w+)?\.(bank|safetensors)")
        for path in self.folder.iterdir() if is_first() else ():
            if own.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def begin(self, stamp: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Note what job this is, by name and value, or check that it is the one that was begun.

        Returns
        -------
        dict
            What was noted, with ``more``, which may be anything.

        Raises
        ------
        InputError
            If another one was, with the first difference, or a rank has another job than the first.
        """
        stamp = json.loads(json.dumps(dict(stamp)))  # as it is read back
        for other, theirs in enumerate(gather(stamp)):
            for name, value in stamp.items():
                if theirs[name] != value:
                    raise InputError(
                        f"checkpoint: every rank must have the same job, and rank {other} has "
                        f"{difference(name, theirs[name], value)} at rank {rank()}; give all "
                        "the same files, and one kind of device"
                    )
        known = self.get(STAMP)
        if known is None:
            self.put(STAMP, facts={**stamp, **more})
            return {**stamp, **more}
        for name, value in stamp.items():
            theirs = known.facts.get(name)
            if theirs != value:
                raise InputError(
                    f"checkpoint: {self.folder} is of a job with {difference(name, theirs, value)}"
                    "; start the job as it was, or name another folder"
                )
        return known.facts

    def path(self, name: str) -> Path:
        """Return the file of a name."""
        return self.folder / f"{name}{SUFFIX}"

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refusal(self, error: Exception, advice: str) -> InputError:
        where = os.fspath(self.folder)
        return InputError(f"checkpoint: can't write into {where!r}: {one_line(error)}; {advice}")


def facts_of(path: Path) -> dict[str, Any] | None:
    """Return the facts of a file that :meth:`Progress.put` wrote; None of any other file."""
    try:
        if not path.is_file():
            return None
        with safe_open(os.fspath(path), framework="pt") as file:
            return dict(json.loads(file.metadata()["facts"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


@dataclass(frozen=True)
class _Elsewhere:
    """A tensor that another rank has, and sends when it is asked for."""

    source: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def get(self) -> Tensor:
        return broadcast(None, self.source)


@contextmanager
def opened(
    checkpoint: str | os.PathLike[str] | Progress | None,
) -> Iterator[Progress | None]:
    """Give the progress in a folder, which is closed in the end, or one that is open already."""
    if checkpoint is None or isinstance(checkpoint, Progress):
        yield checkpoint
        return
    with Progress(checkpoint) as progress:
        yield progress


def difference(name: str, before: Any, now: Any) -> str:
    """Return in words how a fact of a job differs; of facts with names the first that does."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for each in {**before, **now}:
            if before.get(each) != now.get(each):
                return difference(each, before.get(each), now.get(each))
    short = [value if len(str(value)) < 80 else f"{str(value)[:80]}..." for value in (before, now)]
    return f"{name} {short[0]}, got {short[1]}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint: {path} is damaged: {one_line(error)}; remove it, and what it holds is "
            "done again"
        ) from error


def _tensor_of(value: Tensor | Held) -> Tensor:
    return value if isinstance(value, Tensor) else value.get()
