"""Files that are complete or absent whenever the process ends, and sealed files of tensors."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from liar_ext.system.errors import refusing

MOST_OF_NAME = 200  # bytes; a name has at most 255
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


@contextmanager
def atomic_write(
    path: str | os.PathLike[str], take: Callable[[str, Path], None] | None = None
) -> Iterator[BinaryIO]:
    """Open a file to be written beside ``path``, whose place it takes when the context ends well.

    ``take`` moves it there, by default over a file of that name. The bytes are on the disk before
    the name is. The next writer removes what a killed one has left, whose lock nobody holds.
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
            (take or os.replace)(name, path)
    finally:
        with suppress(OSError):
            os.unlink(name)  # gone already, unless something failed, or ``take`` made a link
    with suppress(OSError):  # the new name reaches the disk, too, where the file system can
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
    take: Callable[[str, Path], None] | None = None,
) -> None:
    """Write tensors as safetensors, wide elements first; one ``Held`` at a time is in memory.

    ``file/digest``, 16 bytes at the end of the file, is the BLAKE2b digest of all before it.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    kinds = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order]
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in [*kinds, (SEAL, torch.uint8, (SEAL_BYTES,))]:
        end = at + dtype.itemsize * prod(shape)
        header[name] = {"dtype": WORDS[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    header["__metadata__"] = dict(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path, take) as file:
        seal = blake2b(digest_size=SEAL_BYTES)
        _write(file, seal, struct.pack("<Q", len(text)))
        _write(file, seal, text)
        for name in order:
            tensor = tensor_of(tensors[name]).detach().cpu().contiguous()
            _write(file, seal, tensor.view(-1).view(torch.uint8))
            del tensor  # before the next one is there
        file.write(seal.digest())


def tensor_of(value: Tensor | Held) -> Tensor:
    """Return the tensor that is given, or held."""
    return value if isinstance(value, Tensor) else value.get()


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Tell whether the bytes of a file are those that were written."""
    seal, left = blake2b(digest_size=SEAL_BYTES), os.stat(path).st_size - SEAL_BYTES
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            seal.update(chunk)
            left -= len(chunk)
        return not left and file.read(SEAL_BYTES + 1) == seal.digest()


def begins_with(mark: str) -> Callable[[Path], bool]:
    """Return what tells whether a file begins with a mark."""

    def is_ours(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(mark.encode())) == mark.encode()

    return is_ours


def write_whole(path: Path, data: str, operation: str, option: str) -> None:
    """Write a text file; raise InputError if it can't be written."""
    hint = f"give another name with {option}"
    with refusing(f"{operation}: can't write {path}", hint, OSError), atomic_write(path) as file:
        file.write(data.encode())


def _write(file: BinaryIO, seal: Any, part: bytes | Tensor) -> None:
    data = memoryview(part.numpy()) if isinstance(part, Tensor) else part
    seal.update(data)
    file.write(data)


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
    return f".{os.fsdecode(os.fsencode(path.name)[:MOST_OF_NAME])}."
