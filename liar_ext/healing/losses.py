"""Losses of healing: how far the outputs of a model are from those of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from liar_ext.data.batches import Batch
from liar_ext.errors import InputError
from liar_ext.models.inputs import DECODER_IDS, DECODER_MASK, complete_inputs
from liar_ext.models.running import device_of, output_of

ROWS = 256  # logits whose softmax is in memory at once


def losses(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each row, ``(rows,)`` float32, with gradients for the student.

    ============== ================================================== ================
    output         loss                                               row
    ============== ================================================== ================
    logits         ``KL(p ‖ q) = Σ p (log p − log q)``                token, or
                                                                      sequence
    a single logit ``(z − z')²``                                      sequence
    hidden states  ``1 − cos(m, m') + mean (h − h')²``, where m is    sequence
                   the mean of h over the tokens
    ============== ================================================== ================

    Unprimed and p: the dense model. Padding does not count. No labels are used.

    Parameters
    ----------
    student, teacher : nn.Module
        Both are run.
    batch : Batch
        Inputs of the models.

    Raises
    ------
    InputError
        If the outputs of the two models have different shapes.
    """
    batch = replace(batch, inputs=complete_inputs(teacher, batch.inputs, batch.labels))
    with torch.no_grad():
        name, target = _run(teacher, batch)
    _, value = _run(student, batch)
    target = target.to(value.device)
    if value.shape != target.shape:
        raise InputError(
            f"heal: the outputs of the two models must have one shape, got {tuple(value.shape)} "
            f"and {tuple(target.shape)} of the dense model; name the model that was pruned as "
            "teacher"
        )
    mask = batch.mask_of(DECODER_MASK if DECODER_IDS in batch.inputs else "attention_mask")
    if mask is not None and (value.dim() != 3 or mask.shape != value.shape[:2]):
        mask = None  # one output for each sequence
    mask = None if mask is None else mask.to(value.device)
    if name != "logits":
        return _of_states(value.float(), target.float(), mask)
    if mask is not None:
        value, target = value[mask], target[mask]
    rows = value.flatten(0, -2).split(ROWS), target.flatten(0, -2).split(ROWS)
    # The softmax of all rows would take several times the memory of the logits.
    return torch.cat(
        [checkpoint(_of_logits, *some, use_reentrant=False) for some in zip(*rows, strict=True)]
    )


@torch.no_grad()
def mean_loss(student: nn.Module, teacher: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean of :func:`losses` over all rows of some batches."""
    device, total, rows = device_of(student), 0.0, 0
    for batch in batches:
        found = losses(student, teacher, batch.to(device))
        total, rows = total + float(found.sum(dtype=torch.float64)), rows + len(found)
    return total / rows


def _run(model: nn.Module, batch: Batch) -> tuple[str, Tensor]:
    return output_of(model, model(**batch.to(device_of(model)).inputs))


def _of_logits(value: Tensor, target: Tensor) -> Tensor:
    value, target = value.float(), target.float()
    if value.shape[-1] == 1:
        return (value - target).square().flatten()
    dense = target.log_softmax(-1)
    return functional.kl_div(value.log_softmax(-1), dense, reduction="none", log_target=True).sum(
        -1
    )


def _of_states(value: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    distance = (value - target).square().mean(-1)
    if value.dim() == 2:  # embeddings
        return 1 - functional.cosine_similarity(value, target, dim=-1) + distance
    weight = torch.ones_like(distance) if mask is None else mask.to(distance)
    weight = weight / weight.sum(1, keepdim=True)
    pooled = [(weight[..., None] * each).sum(1) for each in (value, target)]
    return 1 - functional.cosine_similarity(*pooled, dim=-1) + (weight * distance).sum(1)
