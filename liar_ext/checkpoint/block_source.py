"""The blocks of a model, read from its files one at a time, and the next one ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.collect import check_finite_tensors
from liar_ext.calibration.kept_text import fingerprint_of
from liar_ext.checkpoint.inspection import inspect_folder, read_config
from liar_ext.checkpoint.loading import load_pruned, load_tokenizer, placement, read_dense
from liar_ext.checkpoint.quietening import quiet
from liar_ext.checkpoint.reading import reading, stock_class
from liar_ext.checkpoint.weights import OpenWeights
from liar_ext.errors import InputError, one_line
from liar_ext.models.registry import family_of
from liar_ext.models.running import blocks_of, body_of
from liar_ext.models.sites import skeleton


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


# What accelerate puts on a model besides hooks: methods that refuse to move it.
MARKS = ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


@dataclass
class Offloaded:
    """A model of which only what lies outside of its blocks is in memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its blocks, and its output head unless it shares its weights, are on the meta device.
    tokenizer
        As of :func:`liar_ext.checkpoint.loading.load_model`.
    weights : OpenWeights
        Reads a tensor of those by its name in the model, in the model's dtype.
    blocks, head : list of str
        Paths of the blocks, and of what was left out beside them.
    """

    model: nn.Module
    tokenizer: Any
    weights: OpenWeights
    blocks: list[str]
    head: list[str]


def load_offloaded(
    name: str | os.PathLike[str], dtype: str | torch.dtype = "float32", device: str = "cpu"
) -> Offloaded:
    """Load a folder or a hub id without its blocks, and without a head of its own weights.

    Raises
    ------
    InputError
        If it can't be loaded, is no safetensors checkpoint, or accelerate isn't installed.
    """
    try:
        from accelerate.hooks import remove_hook_from_submodules
    except Exception as error:  # a broken package raises anything
        raise InputError(
            f"load_model: reading a model block by block needs accelerate ({one_line(error, 160)});"
            " pip install '.[large]'"
        ) from error
    path = Path(name)
    if path.suffix == ".gguf":
        raise InputError(
            "load_model: a GGUF file can't be read block by block, as its weights are packed; give "
            "a folder of safetensors, or leave --max-memory out"
        )
    if placement(device):
        raise InputError(
            "load_model: reading block by block is for one device, got auto; give cpu or cuda, or "
            "leave --max-memory out"
        )
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    blocks, head, device_map = _device_map(name, device)
    given = {"dtype": dtype, "device_map": device_map}
    try:
        if path.is_dir() and "liar" in read_config(path, "load_model"):
            model = load_pruned(path, **given)
        else:
            model = read_dense(name, **given)
    except InputError as error:
        if "offload_folder" not in str(error):
            raise
        raise InputError(
            f"load_model: the files of {name} have weights in another form than its model, experts "
            "one by one for example, which can't be read block by block; leave --max-memory out"
        ) from error
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None))
    remove_hook_from_submodules(model)
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()  # transformers maps it, and the file may change
    for mark in MARKS:
        model.__dict__.pop(mark, None)
    weights, tokenizer = OpenWeights(found.index), load_tokenizer(path, name, model)
    return Offloaded(model.eval(), tokenizer, weights, blocks, head)


def _device_map(name: Any, device: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the paths of blocks and head, and a map that puts them on disk, and all else here."""
    from transformers import AutoConfig

    if Path(name).is_dir():
        inspect_folder(Path(name), "load_model")
    with quiet(), reading(name, "load_model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        model = skeleton(stock_class(config.to_dict(), "load_model"), config)
    blocks = [path for path, _ in blocks_of(model, family_of(model))]
    tied = {key for pair in (model.all_tied_weights_keys or {}).items() for key in pair}
    head = [
        path
        for path, child in model.named_children()
        if body_of(model) not in (child, model)
        and tied.isdisjoint(f"{path}.{key}" for key, _ in child.named_parameters())
        and any(True for _ in child.parameters())
    ]
    on_disk = {*blocks, *head}

    def place(module: nn.Module, path: str) -> dict[str, str]:
        prefix = f"{path}." if path else ""
        if path in on_disk:
            return {path: "disk"}
        if path and not any(each.startswith(prefix) for each in on_disk):
            return {path: device}
        own = [*module._parameters, *module._buffers]
        found = {f"{prefix}{each}": device for each in own}
        for each, child in module.named_children():
            found |= place(child, f"{prefix}{each}")
        return found

    return blocks, head, place(model, "")
