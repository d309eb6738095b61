"""Load a model whose blocks stay in the files of its folder, to be read one by one.

Transformers and accelerate do it: blocks are placed on ``disk``, which leaves them on the meta
device and gives an index of where each tensor lies, under whatever name the file has for it. Their
hooks, which would read the whole model for every batch, are taken off again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liar_ext.checkpoint.inspection import inspect_folder, read_config
from liar_ext.checkpoint.loading import load_pruned, load_tokenizer, placement, read_dense
from liar_ext.checkpoint.open_weights import OpenWeights
from liar_ext.checkpoint.quietening import quiet
from liar_ext.checkpoint.reading import reading, stock_class
from liar_ext.errors import InputError, one_line
from liar_ext.models.reading import blocks_of, body_of
from liar_ext.models.registry import family_of
from liar_ext.models.sites import skeleton

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
