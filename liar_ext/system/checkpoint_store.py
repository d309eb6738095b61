"""The checkpoint of a job: a folder with tensors and facts by key, one sealed file per key.

A file is safetensors, its metadata has the facts as JSON, and it ends in a digest of its bytes: see
:func:`liar_ext.system.files.write_tensors`. Of several ranks the first one reads and writes,
and hands what it reads to the others, so a checkpoint does not depend on the number of ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liar_ext.system.distributed import broadcast, gather, is_first, rank
from liar_ext.system.errors import InputError, refusing, typed
from liar_ext.system.files import (
    SEAL,
    Held,
    is_sealed,
    is_unfinished,
    tensor_of,
    write_tensors,
)

VERSION = 9  # of the keys and their facts
LOCK_FILE, SUFFIX, JOB, RESULT = ".lock", ".safetensors", "job", "result"
JOB_FILE = f"{JOB}{SUFFIX}"
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)
SHARE = 0.05  # of the time that saving under one key may take


class Checkpoint(AbstractContextManager):
    """Store for everything that a job has finished: :meth:`put` it, :meth:`get` it when resumed.

    A file is complete or absent whenever the process ends, and stays until its key is put again.
    All ranks must call :meth:`get`, :meth:`begin` and :meth:`put_shared`; the other methods do
    nothing except at the first one. One process at a time can open the folder, which is made if
    missing; InputError if it is in use, or can't be written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.clock = Path(folder), clock
        self._failure = f"checkpoint: can't write into {os.fspath(self.folder)!r}"
        self._start, self._lock = clock(), None
        self._saved: dict[str, tuple[float, float]] = {}  # by key: end of the save, its seconds
        if not is_first():
            return
        with refusing(self._failure, "name another folder", OSError, ValueError):
            self.folder.mkdir(parents=True, exist_ok=True)
            # A link would lead to somebody else's file.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(self.folder / LOCK_FILE, flags, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise InputError(
                    f"checkpoint: another process works in {self.folder}; wait for it, or name "
                    "another folder"
                ) from None

    def begin(self, job: Mapping[str, Any], **kept: Any) -> dict[str, Any]:
        """Record facts of this job, and return all recorded ones.

        Those of ``job`` must be the same whenever the job is resumed, and at all ranks; ``kept``
        keep the values that they had at first.
        """
        job = json.loads(json.dumps({"version": VERSION, **job}))  # as it is read back
        for other, theirs in enumerate(gather(job)):
            if theirs != job:
                raise InputError(
                    f"checkpoint: every rank must have the same job, and rank {other} has "
                    f"{difference('job', theirs, job)} at rank {rank()}; give all the same files, "
                    "and one kind of device"
                )
        known = self.get(JOB)
        before = {} if known is None else known[1]
        if before and before.get("version") != VERSION:
            raise InputError(
                f"checkpoint: {self.folder} is a checkpoint of another version of liar_ext; remove "
                "it and start the job again, or name another folder"
            )
        resume = f"liar resume {typed(self.folder)} goes on with it"
        # Where the options are the same, the model or a text has changed.
        again = resume if "command" in job else "start the job as it was"
        recorded = {name: before.get(name, value) for name, value in job.items()}
        if recorded != job:
            raise InputError(
                f"checkpoint: {self.folder} is of a job with {difference('job', recorded, job)}; "
                f"{again}, or name another folder"
            )
        facts = {**kept, **job, **before}
        if facts != before:
            self.put(JOB, facts=facts)
        return facts

    def due(self, key: str) -> bool:
        """Tell whether to save a key again: saving takes at most a twentieth of the time."""
        if not is_first():
            return False
        saved, took = self._saved.get(key, (self._start, 0.0))
        return self.clock() - saved >= took / SHARE

    def put(
        self,
        key: str,
        tensors: Mapping[str, Tensor | Held] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write tensors and facts under a key; only one ``Held`` tensor at a time is in memory.

        The fact ``said`` is what a user is told of the key. If it can't be written, the previous
        value of the key is still there.
        """
        if not is_first():
            return
        start, said = self.clock(), {"facts": json.dumps(dict(facts or {}))}
        advice = "free space, and start the same command again; it goes on from what was saved"
        with refusing(self._failure, advice, OSError):
            write_tensors(self.path(key), tensors or {}, said)
        self._saved[key] = self.clock(), self.clock() - start

    def put_shared(
        self, key: str, tensors: Mapping[str, Tensor | Held], facts: Mapping[str, Any]
    ) -> None:
        """Write tensors of all ranks, sorted by name; the first one receives them one by one.

        Of a tensor that several ranks have, that of the first of them is written.
        """
        own = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
        whose = {
            name: _Elsewhere(source, *kind)
            for source, share in reversed([*enumerate(gather(own))])
            for name, kind in share.items()
        }
        order = sorted(whose, key=lambda name: (-whose[name].dtype.itemsize, name))
        self.put(key, {name: tensors.get(name, whose[name]) for name in order}, facts)
        for name in order if not is_first() else ():
            if whose[name].source:
                mine = whose[name].source == rank()
                broadcast(tensor_of(tensors[name]) if mine else None, whose[name].source)

    def get(self, key: str) -> tuple[Stored, dict[str, Any]] | None:
        """Return tensors and facts of a key, None if there are none; InputError if damaged."""
        path, known = self.path(key), None
        if is_first() and path.exists():
            file, facts = _opened(path)
            known = [name for name in file.keys() if name != SEAL], facts
        known = broadcast(known)
        if known is None:
            return None
        return Stored(path, known[0], file if is_first() else None), known[1]

    def need(self, key: str) -> tuple[Stored, dict[str, Any]]:
        """Return tensors and facts of a key, which must be there."""
        known = self.get(key)
        if known is None:
            raise InputError(
                f"checkpoint: {self.path(key)} is missing, and later files need it; remove the "
                "folder and start the job again"
            )
        return known

    def drop(self, prefix: str) -> None:
        """Remove a key, and the keys that start with it and a hyphen."""
        own = re.compile(re.escape(prefix) + r"(-\w+)?" + re.escape(SUFFIX))
        for path in self.folder.iterdir() if is_first() else ():
            if own.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}{SUFFIX}"

    def __exit__(self, *_: object) -> None:
        """Let other processes open the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Stored(Mapping[str, Tensor]):
    """The tensors of a key. Each is read when it is asked for, which all ranks must do at once."""

    def __init__(self, path: Path, names: list[str], file: safe_open | None) -> None:
        self.path, self._names, self._file = path, names, file

    def __getitem__(self, name: str) -> Tensor:
        with reading(self.path):
            if name not in self:
                raise ValueError(f"it has no {name}")
            value = None if self._file is None else self._file.get_tensor(name)
        return broadcast(value)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def opened(
    checkpoint: str | os.PathLike[str] | Checkpoint | None,
) -> AbstractContextManager[Checkpoint | None]:
    """Open the checkpoint in a folder, and close it at the end; one that is open stays open."""
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return nullcontext(checkpoint)
    return Checkpoint(checkpoint)


def facts_of(folder: str | os.PathLike[str], key: str) -> dict[str, Any] | None:
    """Return the facts of a key without opening its checkpoint; None if they can't be read."""
    with suppress(InputError):
        return _opened(Path(folder, f"{key}{SUFFIX}"), sealed=False)[1]
    return None


def keys_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the keys of a checkpoint, in the order in which they were saved."""
    paths = [path for path in Path(folder).iterdir() if path.suffix == SUFFIX]
    paths.sort(key=lambda path: path.lstat().st_mtime_ns)
    return [path.stem for path in paths if facts_of(folder, path.stem) is not None]


def names_in(folder: str | os.PathLike[str]) -> set[str]:
    """Return the names of files in a folder, without the lock and unfinished files."""
    with suppress(OSError, ValueError):
        return {name for name in os.listdir(folder) if not is_unfinished(name)} - {LOCK_FILE}
    return set()


def is_new(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder has no job yet; InputError unless it is for a checkpoint of ours."""
    others = names_in(folder)
    if JOB_FILE in others:
        return False
    if others:
        raise InputError(
            f"checkpoint: {folder} must be a new or empty folder, or a checkpoint, and holds "
            f"{', '.join(sorted(others)[:3])}; name another folder"
        )
    return True


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove the files of a checkpoint, and its folder if it is empty then.

    The job and its result go last, so an interrupted removal can be finished by ``liar resume``.
    """
    keys = sorted(keys_in(folder), key=lambda key: (key == RESULT, key == JOB))
    unfinished = filter(is_unfinished, os.listdir(folder))
    for name in [*unfinished, *(f"{key}{SUFFIX}" for key in keys), LOCK_FILE]:
        Path(folder, name).unlink(missing_ok=True)
    with suppress(OSError):
        os.rmdir(folder)


def difference(name: str, before: Any, now: Any) -> str:
    """Return in words how a fact of a job differs; of facts with names the first that does."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for each in {**before, **now}:
            if before.get(each) != now.get(each):
                return difference(each, before.get(each), now.get(each))
    short = [value if len(str(value)) < 80 else f"{str(value)[:80]}..." for value in (before, now)]
    return f"{name} {short[0]}, got {short[1]}"


def reading(path: Path) -> AbstractContextManager[None]:
    """Turn what goes wrong while a file is read, or its content is used, into an InputError."""
    what, hint = f"checkpoint: {path} is damaged", "remove it, and what it holds is done again"
    return refusing(what, hint, *UNREADABLE, own="checkpoint: ")


def _opened(path: Path, sealed: bool = True) -> tuple[safe_open, dict[str, Any]]:
    with reading(path):
        if not path.is_file():
            raise ValueError("it must be an ordinary file")
        if sealed and not is_sealed(path):
            raise ValueError("its bytes are not those that were written")
        file = safe_open(os.fspath(path), framework="pt").__enter__()
        return file, dict(json.loads(file.metadata()["facts"]))


@dataclass(frozen=True)
class _Elsewhere:
    """A tensor of another rank, which sends it when it is asked for."""

    source: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def get(self) -> Tensor:
        return broadcast(None, self.source)
