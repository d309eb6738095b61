"""A safetensors file that is written a tensor at a time, and knows whether its bytes changed.

``file/digest``, 16 bytes at the end of the file, is the BLAKE2b digest of all before it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from liar_ext.whole_file import whole_file

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


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to be: what the header says of it, and what gives it.

    Parameters
    ----------
    name : str
        Its name.
    dtype, shape
        As the header has them.
    parts : callable
        Gives the tensor in pieces, in their order, when it is written and not before.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """Return the entry of a tensor that is there."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def write_tensors(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    take: Callable[[str, Path], None] | None = None,
) -> None:
    """Write a file that is there whole or not at all; one tensor at a time is in memory.

    Entries of wider elements must come first, so that all are aligned. ``take`` is as for
    :func:`liar_ext.whole_file.whole_file`.

    Raises
    ------
    OSError
        If it can't be written.
    """
    header: dict[str, Any] = {}
    seal_entry = Entry(SEAL, torch.uint8, (SEAL_BYTES,), list)
    at = 0
    for each in [*entries, seal_entry]:
        size = each.dtype.itemsize * prod(each.shape)
        header[each.name] = {
            "dtype": WORDS[each.dtype],
            "shape": each.shape,
            "data_offsets": [at, at + size],
        }
        at += size
    header["__metadata__"] = dict(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path, take) as file:
        seal = blake2b(digest_size=SEAL_BYTES)
        _write(file, seal, struct.pack("<Q", len(text)))
        _write(file, seal, text)
        for each in entries:
            for part in each.parts():
                _write(file, seal, part.detach().cpu().contiguous().view(-1).view(torch.uint8))
        file.write(seal.digest())


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Tell whether the bytes of a file are those that were written."""
    seal, left = blake2b(digest_size=SEAL_BYTES), os.stat(path).st_size - SEAL_BYTES
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            seal.update(chunk)
            left -= len(chunk)
        return not left and file.read(SEAL_BYTES + 1) == seal.digest()


def _write(file: BinaryIO, seal: Any, part: bytes | Tensor) -> None:
    data = memoryview(part.numpy()) if isinstance(part, Tensor) else part
    seal.update(data)
    file.write(data)
