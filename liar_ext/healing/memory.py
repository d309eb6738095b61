"""Memory of healing: whether activations are stored, or computed a second time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liar_ext.data.batches import Batch, count_tokens
from liar_ext.environment import available_memory
from liar_ext.models.inputs import complete_inputs
from liar_ext.models.running import device_of
from liar_ext.models.sites import sites

OF_TRAINED = 12  # bytes: gradient and two moments in float32
OF_FREE = 0.8  # of the free memory may be used


def needs_checkpointing(
    model: nn.Module, batches: Sequence[Batch], trained: Iterable[Tensor]
) -> bool:
    """Tell whether the activations of the largest batch would not fit the free memory."""
    device = device_of(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is None:
        return False
    largest = max(batches, key=count_tokens)
    stored = len(largest) * activation_bytes(model, largest.select([0]).to(device))
    return stored + OF_TRAINED * sum(each.numel() for each in trained) > OF_FREE * free


def activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward pass stores for the backward pass, without weights."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    held: dict[int, Tensor] = {}  # the tensors, too, so that no address is used twice

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = model(**complete_inputs(model, batch.inputs, batch.labels))
    del output
    stored = (each.untyped_storage() for at, each in held.items() if at not in weights)
    return sum(each.nbytes() for each in stored)


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of the blocks of a model."""
    return list(dict.fromkeys(site.path for site in sites(model)))


@contextmanager
def checkpointed(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Let blocks compute their activations a second time in the backward pass."""
    with ExitStack() as stack:
        for block in map(model.get_submodule, paths):
            own = vars(block).get("forward")  # accelerate puts one there
            undo = (
                partial(setattr, block, "forward", own)
                if own
                else partial(delattr, block, "forward")
            )
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            stack.callback(undo)
        yield
