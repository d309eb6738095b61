"""Weights that are read one by one, from safetensors files that stay open.

They are read and not mapped: a mapped file that becomes shorter ends the process by a signal. A
file that another takes the place of stays as it was, and one that is written to is refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from liar_ext.atomic_write import WORDS

DTYPES = {word: dtype for dtype, word in WORDS.items()}


class OpenWeights(Mapping[str, Tensor]):
    """Tensors by name; each is read when it is asked for.

    Parameters
    ----------
    index : mapping
        By the name of a tensor ``safetensors_file``, ``weight_name`` in it if that is another, and
        the ``dtype`` that is wanted, as accelerate has them of weights that are left on disk.
    """

    def __init__(self, index: Mapping[str, Mapping[str, Any]]) -> None:
        self._index = index
        paths = {info["safetensors_file"] for info in index.values()}
        self._files = {path: _File(path) for path in paths}

    def __getitem__(self, name: str) -> Tensor:
        info = self._index[name]
        tensor = self._files[info["safetensors_file"]].read(info.get("weight_name", name))
        return tensor.to(getattr(torch, info["dtype"])) if "dtype" in info else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class _File:
    """A safetensors file, its header, and what it was like when it was opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (held as long as this)
        self._state = self._seen()
        (length,) = struct.unpack("<Q", self._read(8, 0))
        self._start = 8 + length
        self._header = json.loads(bytes(self._read(length, 8)))

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        said = self._header[name]
        begin, end = said["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(memoryview(data.numpy()), self._start + begin)
        return data.view(DTYPES[said["dtype"]]).view(said["shape"])

    def close(self) -> None:
        self._file.close()

    def _read(self, length: int, start: int) -> bytearray:
        data = bytearray(length)
        self._fill(memoryview(data), start)
        return data

    def _fill(self, into: memoryview, start: int) -> None:
        while into and (count := os.preadv(self._file.fileno(), [into], start)):
            into, start = into[count:], start + count
        if into or self._seen() != self._state:
            raise OSError("the file was changed after it was opened")

    def _seen(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns
