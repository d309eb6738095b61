"""What several subcommands need of a model."""

from __future__ import annotations

from pathlib import Path
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


def check_causal(name: str, command: str) -> None:
    """Raise InputError if a folder's config tells that its model predicts no next token."""
    from liar_ext.checkpoint.inspection import read_config
    from liar_ext.checkpoint.reading import stock_class

    path = Path(name)
    if not path.is_dir():
        return
    fields = read_config(path, "load_model")
    stock = stock_class(fields, "load_model")
    if not stock.can_generate() or fields.get("is_encoder_decoder"):
        raise not_causal(stock.__name__, command)


def not_causal(kind: str, command: str) -> InputError:
    """Return the error for a model that tasks of lm-eval can't be run on."""
    return InputError(
        f"{command} --tasks needs a causal language model, got {kind}; judge an encoder by --text"
    )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise InputError if a model that is given text has no tokenizer."""
    if tokenizer is None:
        raise InputError(
            f"load_model: {name} has no tokenizer to read text with; put one into the folder, or "
            "call liar_ext.prune with batches of your own"
        )
