"""Run a model for its outputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device | None:
    """Return the device of a module's first parameter: a model's is where its inputs go."""
    return next((parameter.device for parameter in module.parameters()), default)


def predicts_next_token(model: nn.Module) -> bool:
    """Tell whether a model predicts each token from those before it alone."""
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return False
    # BERT's family has classes with a language head that see both sides unless told not to.
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return any(causal) or not causal


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the key-value cache off while the context is open."""
    training = model.training
    # Parts of a model may have a config of their own.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caching = [each for each in configs.values() if getattr(each, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for config in caching:
            config.use_cache = True


def output_of(model: nn.Module, outputs: Any) -> tuple[str, Tensor]:
    """Return name and value of what a model puts out: logits, or what a head would read.

    That is the last hidden state, or, of towers side by side, the embeddings of all of them in one.
    """
    for name in ("logits", "last_hidden_state"):
        if outputs.get(name) is not None:
            return name, outputs[name]
    embedded = [outputs[name] for name in ("image_embeds", "text_embeds") if name in outputs]
    if embedded:
        return "embeddings", torch.cat(embedded)
    raise InputError(
        f"outputs: {type(model).__name__} gives neither logits nor hidden states, got "
        f"{', '.join(outputs)}; give a model with another head, or its base model"
    )
