"""Files that are complete or absent whenever the process ends; sealed tensors; JSON of strangers.

Of a stranger's JSON text is printable and bounded, numbers are finite, and what is no value of its
kind is None or empty.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from liar_ext.system.errors import InputError, printable, refusing

SEAL, SEAL_BYTES, CHUNK = "file/digest", 16, 1 << 22
WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MOST_BYTES = 64 << 20  # a report of 10⁵ sites takes some 40 MB, an index of 10⁵ tensors less
MOST_TEXT = 400  # characters of one value
MOST_NAMED = 200  # names of one object
LARGEST = 2**53  # of a count: what a double says exactly
UNREADABLE = (OSError, ValueError, RecursionError)  # what a damaged JSON file raises


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to be written beside ``path``, whose place it takes when the context ends well.

    The bytes are on the disk before the name is. The next writer removes what a killed one has
    left, whose lock nobody holds.
    """
    path = Path(path)
    _clean(path)
    # Named before it is there, so that an interrupt at any point finds it.
    name = os.fspath(path.parent / f"{_prefix(path)}{secrets.token_hex(8)}.part")
    try:
        with open(name, "xb") as file:
            with suppress(OSError):  # a file system may have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, path)
    finally:
        with suppress(OSError):
            os.unlink(name)  # gone already, unless something failed
    with suppress(OSError):  # the new name reaches the disk, too, where the file system can
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _clean(path: Path) -> None:
    """Remove the unfinished files of writers of ``path`` that are no more."""
    own = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.part")
    with suppress(OSError):
        for each in path.parent.iterdir():
            if own.fullmatch(each.name) and not each.is_symlink() and each.is_file():
                with suppress(OSError), open(each, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    each.unlink()


def _prefix(path: Path) -> str:
    """Return what the names of unfinished files of ``path`` begin with, so short that they fit."""
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


@contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; in the end remove the new ones that are empty."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # not empty
            for each in missing:
                each.rmdir()


def is_unfinished(name: str) -> bool:
    """Tell whether a name is that of an unfinished file, which a killed writer leaves."""
    return re.fullmatch(r"\..+\.[0-9a-f]{16}\.part", name) is not None


class Held(Protocol):
    """Something that returns a tensor on request, such as hidden states on disk."""

    shape: Sequence[int]
    dtype: torch.dtype

    def get(self) -> Tensor:
        """Return it."""


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Held],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as safetensors, wide elements first; one ``Held`` at a time is in memory.

    ``file/digest``, 16 bytes at the end of the file, is the BLAKE2b digest of all before it.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    kinds = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order]
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in [*kinds, (SEAL, torch.uint8, (SEAL_BYTES,))]:
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": WORDS[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    header["__metadata__"] = dict(metadata)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    with atomic_write(path) as file:
        file.write(head)
        seal = hashlib.blake2b(head, digest_size=SEAL_BYTES)
        for name in order:
            tensor = tensor_of(tensors[name]).detach().cpu().contiguous()
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            file.write(data)
            seal.update(data)
            del tensor, data  # before the next one is there
        file.write(seal.digest())


def tensor_of(value: Tensor | Held) -> Tensor:
    """Return the tensor that is given, or held."""
    return value if isinstance(value, Tensor) else value.get()


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Tell whether the bytes of a file are those that were written."""
    seal, left = hashlib.blake2b(digest_size=SEAL_BYTES), os.stat(path).st_size - SEAL_BYTES
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            seal.update(chunk)
            left -= len(chunk)
        return not left and file.read(SEAL_BYTES + 1) == seal.digest()


def begins_with(mark: str, path: Path) -> bool:
    """Tell whether a file begins with a mark."""
    with open(path, "rb") as file:
        return file.read(len(mark.encode())) == mark.encode()


def write_whole(path: Path, data: str, operation: str, option: str) -> None:
    """Write a text file; raise InputError if it can't be written."""
    hint = f"give another name with {option}"
    with refusing(f"{operation}: can't write {path}", hint, OSError), atomic_write(path) as file:
        file.write(data.encode())


def read_json(path: Path, operation: str) -> dict[str, Any]:
    """Return the object in a JSON file; refuse any other file, or what is too large or deep."""
    if not os.path.lexists(path):
        raise InputError(f"{operation}: there is no file {path}")
    with refusing(f"{operation}: {path} can't be read", "copy it again", *UNREADABLE):
        value = read_value(path)
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__} and no object")
    return value


def read_value(path: Path) -> Any:
    """Return the value of a JSON file; raises one of ``UNREADABLE``."""
    if not path.is_file():
        raise ValueError("it is no ordinary file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes, which is too many")
    return json.loads(data.decode("utf-8"))


def text(value: Any, most: int = MOST_TEXT) -> str:
    """Return a value as printable text of bounded length; "" of None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        flat = len(value) <= most and not any(isinstance(each, list | dict) for each in value)
        value = ", ".join(map(str, value)) if flat else f"{len(value):,} entries"
    said = str(value)[: most + 1] if not isinstance(value, int) or abs(value) < LARGEST else "?"
    said = printable(said)
    return said if len(said) <= most else said[:most] + "…"


def number(value: Any) -> float | None:
    """Return a finite number as it is, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: Any) -> int | None:
    """Return an integer of at least 0, or None."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return value if number and 0 <= value < LARGEST else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return an object, or an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """Return a list, or an empty one."""
    return value if isinstance(value, list) else []


def named(value: Any) -> dict[str, Any]:
    """Return the names and values of an object: numbers as they are, all else as text."""
    return {
        text(key, 60): each if isinstance(each, bool) or number(each) is not None else text(each)
        for key, each in list(mapping(value).items())[:MOST_NAMED]
    }
