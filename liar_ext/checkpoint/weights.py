"""Weights that are read one by one, from safetensors files that stay open.

They are read and not mapped: a mapped file that becomes shorter ends the process by a signal. A
file that another takes the place of stays as it was, and one that is written to is refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from liar_ext.atomic_write import WORDS
from liar_ext.checkpoint.inspection import INDEX, WEIGHTS

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


SHARD_BYTES = 2 << 30  # a shard is held in memory until it is written


class Shards:
    """The weights of a model on their way to a folder.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Whose weights they are: it knows by which names they are saved.
    folder : Path
        Where they go.
    size : int
        Bytes of a shard: it is written as soon as it has so many.
    """

    def __init__(self, model: nn.Module, folder: Path, size: int = SHARD_BYTES) -> None:
        self._model, self._folder, self._size = model, folder, size
        self._waiting: dict[str, Tensor] = {}
        self._written: list[list[str]] = []  # names by shard
        self._bytes = self._params = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors by their name in the model; those that share memory come in one call."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        left_out = self._model._keys_to_ignore_on_save or ()
        kept = {name: value for name, value in tensors.items() if name not in left_out}
        kept = remove_tied_weights_from_state_dict(kept, self._model)
        for name, value in revert_weight_conversion(self._model, kept).items():
            self._waiting[name] = value.detach().cpu().contiguous()
            self._params += value.numel()
        if sum(value.nbytes for value in self._waiting.values()) >= self._size:
            self._write()

    def close(self) -> None:
        """Write what is left, give the shards their names, and write the index, last of all."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        where = {}
        for index, names in enumerate(self._written):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._part(index).rename(self._folder / file)
            where |= dict.fromkeys(names, file)
        facts = {"total_parameters": self._params, "total_size": self._bytes}
        text = json.dumps({"metadata": facts, "weight_map": where}, indent=2, sort_keys=True)
        (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index + 1:05}.safetensors"

    def _write(self) -> None:
        if self._waiting:
            self._written.append(list(self._waiting))
            self._bytes += sum(value.nbytes for value in self._waiting.values())
            path = self._part(len(self._written) - 1)
            save_file(self._waiting, path, metadata={"format": "pt"})
            self._waiting = {}
