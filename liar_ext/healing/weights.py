"""The weights that healing trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError

LORA_RANK = 16

State = dict[str, Tensor]


def choose(model: nn.Module, train: str, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model to train, with adapters for ``lora``, and its trained parameters by name.

    Raises
    ------
    InputError
        If peft is missing, or there is nothing to train.
    """
    if train == "lora":
        model = _with_adapters(model, seed)
    left, norms = set(), set()
    for module in model.modules():
        own = {id(each) for each in module.parameters(recurse=False)}
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            left |= own
        if "norm" in type(module).__name__.lower():
            norms |= own
    trained = {
        name: each
        for name, each in model.named_parameters()
        if each.requires_grad
        and (train != "no-embeddings" or id(each) not in left)
        and (train != "norms" or id(each) in norms)
    }
    if not trained:
        raise InputError(f"heal: train={train!r} leaves no weights to train; choose another")
    kept = {id(each) for each in trained.values()}
    for each in model.parameters():
        each.requires_grad_(id(each) in kept)
    return model, trained


def _with_adapters(model: nn.Module, seed: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError(
            'heal: train="lora" needs peft, which is not installed; pip install peft, or choose '
            'train="no-embeddings"'
        ) from None
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def put(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy values into parameters."""
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def set_dtypes(model: nn.Module, like: State | None = None) -> None:
    """Give parameters float32, or the dtypes of others; buffers keep theirs."""
    for name, each in model.named_parameters():
        each.data = each.data.to(torch.float32 if like is None else like[name].dtype)
