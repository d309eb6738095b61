"""The blocks of a model, read from its files one at a time, and the next one ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from liar_ext.calibration.collect import check_finite_tensors
from liar_ext.calibration.fingerprints import fingerprint_of
from liar_ext.checkpoint.offloading import load_offloaded
from liar_ext.errors import InputError, one_line


class BlockStore:
    """A model of which one block is in memory at a time.

    What lies outside of the blocks, embeddings and final norm, is always there; an output head with
    weights of its own is not, see :meth:`head`.

    Parameters
    ----------
    name : path or str
        A folder, pruned or not, or a hub id.
    dtype : str or torch.dtype
        Of the weights.
    device : str
        Where the model computes.
    prefetch : bool
        Read the next block while one is in use, which takes memory for two.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model; parameters that aren't in memory are on the meta device.
    tokenizer
        None where there is none.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        *,
        prefetch: bool = True,
    ) -> None:
        found = load_offloaded(name, dtype, device)
        self.model, self.tokenizer = found.model, found.tokenizer
        self.device, self.prefetch = torch.device(device), prefetch
        self._weights, self._paths, self._head = found.weights, found.blocks, found.head
        self._reader = ThreadPoolExecutor(1, "liar-blocks")
        self._next: tuple[int, Future] | None = None
        check_finite_tensors((n, p) for n, p in self.model.named_parameters() if not p.is_meta)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block, as the model is now."""
        return max(self._bytes(path) for path in self._paths)

    @property
    def head_bytes(self) -> int:
        """Bytes of the output head, unless it is always in memory."""
        return sum(self._bytes(path) for path in self._head)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Have the weights of one block in memory for as long as the context is open."""
        path = self._paths[index]
        self._install(self._taken(index))
        if self.prefetch and index + 1 < len(self):
            self._next = index + 1, self._reader.submit(self._read_below, self._paths[index + 1])
        try:
            yield self.model.get_submodule(path)
        finally:
            self._drop(path)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Have the output head in memory for as long as the context is open."""
        for path in self._head:
            self._install(self._read_below(path))
        try:
            yield
        finally:
            for path in self._head:
                self._drop(path)

    def tensors(self, index: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of a block by name, or of all that lies outside of the blocks."""
        if index is not None:
            path = self._paths[index]
            block = self.model.get_submodule(path)
            return {f"{path}.{name}": value for name, value in block.state_dict().items()}
        inside = tuple(f"{path}." for path in self._paths)
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if not name.startswith(inside)}

    def fingerprint(self) -> str:
        """Return what tells the weights from others; of each a few values are read."""
        return fingerprint_of(self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            with _naming(name):
                yield name, self._weights[name] if parameter.is_meta else parameter

    def close(self) -> None:
        """Stop reading ahead."""
        self._next = None
        self._reader.shutdown(cancel_futures=True)
        self._weights.close()

    def _taken(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a block, which may have been read ahead."""
        ahead, self._next = self._next, None
        if ahead is None:
            return self._read_below(self._paths[index])
        tensors = ahead[1].result()
        if ahead[0] == index:
            return tensors
        del tensors, ahead
        return self._read_below(self._paths[index])

    def _read_below(self, path: str) -> dict[str, Tensor]:
        """Read the parameters below a path."""
        tensors = {}
        for leaf, _ in self.model.get_submodule(path).named_parameters():
            name = f"{path}.{leaf}"
            with _naming(name):
                tensors[name] = self._weights[name]
        check_finite_tensors(tensors.items())
        return tensors

    def _install(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            _put(self.model, name, value.to(self.device))

    def _drop(self, path: str) -> None:
        for name, value in self.model.get_submodule(path).named_parameters():
            _put(self.model, f"{path}.{name}", torch.empty_like(value, device="meta"))

    def _bytes(self, path: str) -> int:
        parameters = self.model.get_submodule(path).parameters()
        return sum(each.numel() * each.element_size() for each in parameters)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let an error of reading a tensor say which one it is."""
    try:
        yield
    except Exception as error:  # of the file: safetensors and torch raise as they like
        raise InputError(
            f"prune: can't read {name} from its file: {one_line(error)}; copy the folder again"
        ) from error


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
