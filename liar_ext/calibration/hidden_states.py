"""Hidden states between blocks: in memory up to a bound, beyond it in a file on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from liar_ext.errors import InputError

MOST_AT_ONCE = 1 << 30  # bytes of one call; Linux moves at most 2 GiB


class HiddenStates:
    """A place for tensors that all calibration sequences have between two blocks.

    ``memory`` are the bytes that may be held in memory, without bound if not given; what is more
    goes to a file in ``folder``. It has no name, so that nothing is left of it however the process
    ends. ``in_memory`` and ``on_disk`` are the bytes that are held now.
    """

    def __init__(
        self, memory: int | None = None, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.memory, self.folder = memory, folder
        self.in_memory = self.on_disk = self.most_on_disk = 0
        self._file = None
        self._free: dict[int, list[int]] = {}  # offsets by size

    def hold(self, tensor: Tensor) -> Held:
        """Return what gives a tensor back, on the CPU; its place is free once that is dropped."""
        return Held(self, tensor)

    def close(self) -> None:
        """Give the disk back; nothing that was held in the file can be read any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, size: int) -> int | None:
        """Return the offset of ``size`` bytes in the file, or None if memory has room for them."""
        if self.memory is None or self.in_memory + size <= self.memory:
            self.in_memory += size
            return None
        if self._free.get(size):
            self.on_disk += size
            return self._free[size].pop()
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
        start = self.most_on_disk
        try:
            os.posix_fallocate(self._file.fileno(), start, size)
        except OSError as error:
            where = Path(self.folder or tempfile.gettempdir())
            raise InputError(
                f"hidden states: {(start + size) / 2**30:.3g} GiB and more are needed in {where}, "
                f"where {shutil.disk_usage(where).free / 2**30:.3g} GiB are free "
                f"({error.strerror}); free disk space, raise --max-memory, or give fewer --samples"
            ) from error
        self.on_disk += size
        self.most_on_disk += size
        return start

    def give_back(self, offset: int | None, size: int) -> None:
        """Let bytes be used for other tensors."""
        if offset is None:
            self.in_memory -= size
        else:
            self.on_disk -= size
            self._free.setdefault(size, []).append(offset)

    def move(self, call: Callable[..., int], bytes_: memoryview, offset: int) -> None:
        """Read or write bytes at an offset of the file, by a call that may move some of them."""
        while len(bytes_):
            done = call(self._file.fileno(), [bytes_[:MOST_AT_ONCE]], offset)
            bytes_, offset = bytes_[done:], offset + done


class Held:
    """One tensor of :class:`HiddenStates`: :meth:`get` it, or :meth:`set` another in its place."""

    def __init__(self, store: HiddenStates, tensor: Tensor) -> None:
        self._store = store
        self._tensor: Tensor | None = None
        self._offset: int | None = None
        self._size: int | None = None  # None while no place is taken
        self.set(tensor)

    def get(self) -> Tensor:
        """Return the tensor; not to be changed in place."""
        if self._offset is None:
            return self._tensor
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._store.move(os.preadv, _bytes(tensor), self._offset)
        return tensor

    def set(self, tensor: Tensor) -> None:
        """Hold another tensor instead."""
        tensor = tensor.detach().cpu()
        if tensor.nbytes != self._size:
            self._drop()
            self._offset = self._store.take(tensor.nbytes)
            self._size = tensor.nbytes
        self.shape, self.dtype = tensor.shape, tensor.dtype
        if self._offset is None:
            self._tensor = tensor
        else:
            self._store.move(os.pwritev, _bytes(tensor.contiguous()), self._offset)

    def _drop(self) -> None:
        if self._size is not None:
            self._store.give_back(self._offset, self._size)
        self._tensor = self._offset = self._size = None

    def __del__(self) -> None:
        self._drop()


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
