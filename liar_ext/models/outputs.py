"""What a model puts out, by name, and what its logits say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from liar_ext.system.errors import InputError

LOGITS = ("logits", "spans", "labels", "scores")  # outputs of a head


def output_of(model: nn.Module, outputs: Any, mask: Tensor | None = None) -> tuple[str, Tensor]:
    """Return name and value of what a model puts out: logits, or what a head would read.

    That is the last hidden state, or, of towers side by side, the embeddings of all of them in one;
    of a diffusion transformer the noise, or velocity, of each sample, ``(samples, features)``.
    Spans are the logits of where an answer starts and ends, ``(sequences, 2, tokens)``; tokens that
    the ``mask`` leaves out are none of their classes. Logits are of classes, of which one is right,
    but for labels, each right or not by itself, and scores, which are no probabilities: those of a
    regression, or a lone one.
    """
    if outputs.get("sample") is not None:
        return "sample", outputs["sample"].flatten(1)
    if outputs.get("start_logits") is not None:
        spans = torch.stack([outputs["start_logits"], outputs["end_logits"]], 1)
        if mask is not None:
            unread = ~mask.bool().to(spans.device)[:, None]
            spans = spans.masked_fill(unread, -1e4)  # whose probability is zero
        return "spans", spans
    if outputs.get("logits") is not None:
        return _kind_of(model, outputs["logits"]), outputs["logits"]
    if outputs.get("last_hidden_state") is not None:
        return "last_hidden_state", outputs["last_hidden_state"]
    embedded = [outputs[name] for name in ("image_embeds", "text_embeds") if name in outputs]
    if embedded:
        return "embeddings", torch.cat(embedded)
    raise InputError(
        f"outputs: {type(model).__name__} gives neither logits nor hidden states, got "
        f"{', '.join(outputs)}; give a model with another head, or its base model"
    )


def _kind_of(model: nn.Module, logits: Tensor) -> str:
    problem = getattr(model.config, "problem_type", None) if logits.dim() == 2 else None
    if problem == "multi_label_classification":
        return "labels"
    return "scores" if problem == "regression" or logits.shape[-1] == 1 else "logits"


def check_alike(
    model: nn.Module, own: tuple[str, Sequence[int]], dense: tuple[str, Sequence[int]]
) -> None:
    """Raise InputError if name and shape of a model's outputs are not those of the dense one."""
    if own != dense:
        found, needed = (f"{name} of shape {tuple(shape)}" for name, shape in (own, dense))
        raise InputError(
            f"evaluation: {type(model).__name__} gives {found}, and the dense model {needed}; give "
            "the model that was pruned as the dense one"
        )


def log_probabilities(name: str, logits: Tensor) -> Tensor:
    """Return log p of classes; of labels, ``(rows, 2 labels)``, log p and then log (1 − p)."""
    if name == "labels":
        return torch.cat([logsigmoid(logits), logsigmoid(-logits)], -1)
    return logits.log_softmax(-1)


def agree(name: str, p: Tensor, logits: Tensor) -> Tensor:
    """Tell by row whether :func:`log_probabilities` and logits choose one class, or all labels."""
    if name != "labels":
        return p.argmax(-1) == logits.argmax(-1)
    yes, no = p.chunk(2, -1)
    return ((yes > no) == (logits > 0)).all(-1)


def token_weights(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return what tokens weigh in the mean of their sequence, (sequences, tokens) float32.

    A mask of another shape, as of samples where states are of frames, leaves all tokens in.
    """
    weight = torch.ones(states.shape[:2], device=states.device)
    if mask is not None and mask.shape == weight.shape:
        weight = mask.to(weight)
    return weight / weight.sum(1, keepdim=True)
