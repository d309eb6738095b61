"""The blocks of a model, read from its files one at a time, and the next one ahead.

Weights are read and not mapped: a mapped file that becomes shorter ends the process by a signal. A
file that another takes the place of stays as it was, and one that is written to is refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.collect import check_finite_tensors
from liar_ext.calibration.saved_sums import fingerprint_of
from liar_ext.checkpoint.inspection import (
    inspect_folder,
    reach_hub,
    read_config,
    reading,
    stock_class,
)
from liar_ext.checkpoint.loading import (
    bare_class,
    dtype_of,
    load_pruned,
    placement,
    read_dense,
)
from liar_ext.checkpoint.placing import beside, clean_leftovers
from liar_ext.checkpoint.readers import load_tokenizer
from liar_ext.models.registry import family_of, skeleton
from liar_ext.models.running import blocks_of, body_of
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.files import WORDS
from liar_ext.system.progress import quiet

DTYPES = {word: dtype for dtype, word in WORDS.items()}
FREE = "free disk space there, or leave --max-memory out"
# What accelerate puts on a model besides hooks: methods that refuse to move it.
MARKS = ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


class BlockStore:
    """A folder or a hub id, as a model of which one block is in memory at a time.

    What lies outside of the blocks, embeddings and final norm, is always there; an output head with
    weights of its own is not, see :meth:`head`. Parameters that aren't in memory are on the meta
    device. ``changes`` say, by names of parameters of blocks, what becomes of them when they are
    read. ``tokenizer`` may be None. ``prefetch`` reads the next block while one is in use, which
    takes memory for two.

    Files may hold experts one by one, which the model has in one parameter of a layer. Such
    parameters are put together when the model is loaded, one at a time, and lie in files without
    names in ``room``, by default where temporary files go.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        *,
        prefetch: bool = True,
        room: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model, self._weights, self._paths, self._head = _loaded(name, dtype, device, room)
        self.tokenizer = load_tokenizer(name, self.model)
        self.device, self.prefetch, self._heads = torch.device(device), prefetch, 0
        self.changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for path, parameter in self.model.named_parameters():
            if parameter.is_meta and (shape := self._weights.shape(path)) != parameter.shape:
                raise InputError(
                    f"load_model: {name} has {path} with shape {tuple(shape)}, its config or plan "
                    f"says {tuple(parameter.shape)}; copy it again"
                )
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
        """Have the output head in memory for as long as the outermost such context is open."""
        self._heads += 1
        try:
            for path in self._head if self._heads == 1 else ():
                self._install(self._read_below(path))
            yield
        finally:
            self._heads -= 1
            for path in self._head if not self._heads else ():
                self._drop(path)

    def tensors(self, index: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of a block by name, or of all that lies outside of the blocks."""
        if index is not None:
            path = self._paths[index]
            return self.model.get_submodule(path).state_dict(prefix=f"{path}.")
        inside = tuple(f"{path}." for path in self._paths)
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if not name.startswith(inside)}

    def fingerprint(self) -> str:
        """Return what tells the weights from others; all of them are read, one by one."""
        return fingerprint_of(
            (name, self._weights[name] if parameter.is_meta else parameter)
            for name, parameter in self.model.named_parameters()
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self._next = None
        self._reader.shutdown(cancel_futures=True)
        self._weights.close()

    def _taken(self, index: int) -> dict[str, Tensor]:
        ahead, self._next = self._next, None
        tensors = ahead[1].result() if ahead is not None else None
        if ahead is not None and ahead[0] == index:
            return tensors
        del tensors, ahead  # before others are read
        return self._read_below(self._paths[index])

    def _read_below(self, path: str) -> dict[str, Tensor]:
        leaves = (name for name, _ in self.model.get_submodule(path).named_parameters())
        tensors = {f"{path}.{leaf}": self._weights[f"{path}.{leaf}"] for leaf in leaves}
        check_finite_tensors(tensors.items())
        for name in tensors.keys() & self.changes.keys():
            tensors[name] = self.changes[name](tensors[name])
        return tensors

    def _install(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(value.to(self.device), requires_grad=False)
            self.model.get_submodule(owner)._parameters[leaf] = parameter

    def _drop(self, path: str) -> None:
        for module in self.model.get_submodule(path).modules():
            for leaf, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty_like(value, device="meta")
                    module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _bytes(self, path: str) -> int:
        return sum(each.nbytes for each in self.model.get_submodule(path).parameters())


def _loaded(
    name: Any, dtype: str | torch.dtype, device: str, room: Any
) -> tuple[nn.Module, OpenWeights, list[str], list[str]]:
    """Return a model without blocks and head, their tensors by name, and the paths of both."""
    what = "load_model: reading a model block by block needs accelerate"
    with refusing(what, "pip install accelerate", Exception):
        from accelerate.hooks import remove_hook_from_submodules
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
    dtype = dtype_of(dtype)
    blocks, head, device_map = _device_map(name, device)
    is_pruned = path.is_dir() and "liar" in read_config(path, "load_model")
    read = load_pruned if is_pruned else read_dense
    place = Path(room or gettempdir(), "liar-experts")
    clean_leftovers(place)
    with beside(place) as apart:
        apart.chmod(0o700)  # it may lie where others can read
        with refusing(f"load_model: can't put experts together in {apart}", FREE, OSError):
            model = read(name, dtype=dtype, device_map=device_map, offload_folder=apart)
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        maps = (hook.weights_map for hook in hooks if getattr(hook, "weights_map", None))
        weights = OpenWeights(next(maps).dataset.index)  # its files stay when their names go
    remove_hook_from_submodules(model)
    for module in model.modules():  # accelerate leaves a forward of this very module, copies' too
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del module.forward
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()  # transformers maps it, and the file may change
    for mark in MARKS:
        model.__dict__.pop(mark, None)
    return model.eval(), weights, blocks, head


def _device_map(name: Any, device: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the paths of blocks and head, and a map that puts them on disk, and all else here."""
    from transformers import AutoConfig

    bare = None
    if Path(name).is_dir():
        found = inspect_folder(Path(name), "load_model")
        bare = bare_class(found, stock_class(found.config, "load_model"))
    else:
        reach_hub(name)
    with quiet(), reading(name, "load_model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        model = skeleton(bare or stock_class(config.to_dict(), "load_model"), config)
    blocks = [path for path, _ in blocks_of(model, family_of(model))]
    tied = {key for pair in (model.all_tied_weights_keys or {}).items() for key in pair}
    head = [
        path
        for path, child in model.named_children()
        if body_of(model) not in (child, model)
        and tied.isdisjoint(f"{path}.{key}" for key, _ in child.named_parameters())
        and any(True for _ in child.parameters())
    ]
    apart = (*blocks, *head)
    inside = tuple(f"{path}." for path in apart)
    named = (model.named_parameters, model.named_buffers)
    all_names = [name for each in named for name, _ in each(remove_duplicate=False)]
    outside = [name for name in all_names if not name.startswith(inside)]
    here = {_mapped(name, apart): device for name in outside}
    return blocks, head, here | dict.fromkeys(apart, "disk")


def _mapped(name: str, apart: tuple[str, ...]) -> str:
    """Return a tensor's module, or its own name if the module has what is mapped apart."""
    owner = name.rpartition(".")[0]
    return name if not owner or any(path.startswith(f"{owner}.") for path in apart) else owner


class OpenWeights:
    """Tensors by name, of safetensors files that stay open; each is read when it is asked for.

    ``index`` has by name ``safetensors_file``, ``weight_name`` in it if that is another, and the
    ``dtype`` that is wanted, as accelerate has them of weights that are left on disk.
    """

    def __init__(self, index: Mapping[str, Mapping[str, Any]]) -> None:
        self._index = index
        paths = {info["safetensors_file"] for info in index.values()}
        self._files = {path: _File(path) for path in paths}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, by the header of its file."""
        info = self._index[name]
        said = self._files[info["safetensors_file"]].header[info.get("weight_name", name)]
        return tuple(said["shape"])

    def __getitem__(self, name: str) -> Tensor:
        what = f"prune: can't read {name} from its file"
        with refusing(what, "copy the folder again", Exception):
            info = self._index[name]
            tensor = self._files[info["safetensors_file"]].read(info.get("weight_name", name))
            return tensor.to(getattr(torch, info["dtype"])) if "dtype" in info else tensor

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class _File:
    """A safetensors file, its header, and what it was like when it was opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (held as long as this)
        self.close, self._state = self._file.close, self._seen()
        (length,) = struct.unpack("<Q", self._read(8, 0))
        self._start = 8 + length
        self.header = json.loads(bytes(self._read(length, 8)))

    def read(self, name: str) -> Tensor:
        said = self.header[name]
        begin, end = said["data_offsets"]
        data = torch.from_numpy(self._read(end - begin, self._start + begin))
        return data.view(DTYPES[said["dtype"]]).view(said["shape"])

    def _read(self, length: int, start: int) -> Any:
        """Return bytes of the file, as an array that owns them."""
        data = torch.empty(length, dtype=torch.uint8).numpy()
        into = memoryview(data)
        while into and (count := os.preadv(self._file.fileno(), [into], start)):
            into, start = into[count:], start + count
        if into or self._seen() != self._state:
            raise OSError("the file was changed after it was opened")
        return data

    def _seen(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns
