"""Run a model for its outputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache
