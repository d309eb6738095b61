"""Evaluation: how good a model is, dense or pruned, by the same measure."""

from __future__ import annotations

import math

import torch
from torch import nn

from liar_ext.bars import Bar
from liar_ext.data.batches import Batches, read_batches
from liar_ext.errors import InputError
from liar_ext.models.running import device_of, evaluating, predicts_next_token
from liar_ext.selection.divergence import DenseOutputs

MOST_EXPONENT = 709  # of exp in float64


@torch.no_grad()
def perplexity(model: nn.Module, batches: Batches, *, progress: bool = False) -> dict[str, float]:
    """Return the perplexity ``exp(−(1/N) Σ log p(token | tokens before it in its window))``.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    batches : iterable of mapping or Tensor
        ``input_ids`` and ``attention_mask``, ``(batch, seq_len)`` each; without a mask every token
        counts. Padding is neither predicted nor predicted from.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        ``perplexity``; ``tokens`` predicted (the first of each window is not); ``sequences``;
        ``seq_len``. Perplexities at different ``seq_len`` do not compare.

    Raises
    ------
    InputError
        If the model doesn't predict each token from those before it, gives no token logits, or
        there is nothing to predict.
    """
    if not predicts_next_token(model):
        raise InputError(
            "perplexity: needs a causal language model, got "
            f"{type(model).__name__}, which sees the tokens that it is to predict, or predicts none"
        )
    device = device_of(model)
    loss, tokens, sequences, seq_len = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in read_batches(Bar(batches, desc="evaluate", disable=not progress)):
            batch = batch.to(device)
            ids = batch.inputs["input_ids"]
            mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask
            output = model(input_ids=ids, attention_mask=mask.to(ids.dtype), use_cache=False)
            if getattr(output, "logits", None) is None or output.logits.shape[:2] != ids.shape:
                raise InputError("perplexity: needs a causal language model with token logits")
            for logits, target, real in zip(output.logits, ids, mask, strict=True):
                chosen = real[:-1] & real[1:]
                loss += float(
                    nn.functional.cross_entropy(
                        logits[:-1][chosen].float(), target[1:][chosen], reduction="sum"
                    )
                )
                tokens += int(chosen.sum())
            sequences += len(ids)
            seq_len = max(seq_len, ids.shape[1])
    if not tokens:
        raise InputError("perplexity: no token to predict; give more text")
    mean = loss / tokens
    return {
        "perplexity": math.inf if mean > MOST_EXPONENT else math.exp(mean),
        "tokens": tokens,
        "sequences": sequences,
        "seq_len": seq_len,
    }


@torch.no_grad()
def kl_divergence(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    *,
    progress: bool = False,
) -> float:
    """Return ``(1/N) Σ KL(p ‖ q)`` in nats: p the dense model's predictions, q those of ``model``.

    It says how much of the dense model's behaviour is lost, whatever the text, where perplexity
    says how well a text is predicted. Models without logits are compared by their last hidden
    state; see :class:`liar_ext.selection.divergence.DenseOutputs`.

    Parameters
    ----------
    model, dense : nn.Module
        Models with the same outputs.
    batches : iterable of mapping
        Inputs of the models, such as ``input_ids`` and ``attention_mask``.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        If there is no batch.
    """
    total, rows = 0.0, 0
    with evaluating(model), evaluating(dense):
        for batch in read_batches(Bar(batches, desc="divergence", disable=not progress)):
            compared = DenseOutputs(dense, batch)
            total, rows = total + compared.divergence(model), rows + len(compared)
    if not rows:
        raise InputError("kl_divergence: needs at least one batch, got none; give more text")
    return total / rows
