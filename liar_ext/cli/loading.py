"""What several subcommands need of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from liar_ext.errors import InputError


def load_with_tokenizer(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """Return a model and its tokenizer.

    Raises
    ------
    InputError
        If it can't be loaded, or has no tokenizer.
    """
    from liar_ext import checkpoint

    model, tokenizer = checkpoint.load_model(name, dtype, device)
    check_tokenizer(name, tokenizer)
    return model, tokenizer


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise InputError if a model that is given text has no tokenizer."""
    if tokenizer is None:
        raise InputError(
            f"load_model: {name} has no tokenizer to read text with; put one into the folder, or "
            "call liar_ext.prune with batches of your own"
        )
