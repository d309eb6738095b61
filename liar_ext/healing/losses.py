"""What a pruned model is trained towards, the outputs of its dense one, and the distance to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from liar_ext.calibration.batches import Batch, completed
from liar_ext.models.outputs import LOGITS, output_of, token_weights
from liar_ext.models.running import device_of
from liar_ext.system.distributed import all_reduce, local_world_size, rank, world_size
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError

AT_ONCE = 1 << 19  # logits whose softmax is taken at once: ten rows of 50,000 stay in caches
OF_FREE = 0.1  # of the free memory that outputs of the dense model may take


@dataclass(frozen=True)
class Target:
    """What the dense model gives for a batch, which here has all that the models read."""

    batch: Batch
    name: str
    value: Tensor
    mask: Tensor | None  # which outputs count; None: all


class Teacher:
    """A dense model, whose outputs for a batch are computed once, while memory has room."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.known = model, {}
        self.room = int(OF_FREE * (available_memory() or 0) / max(local_world_size(), 1))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target:
        """Return what the model gives for a batch."""
        if id(batch) in self.known:
            return self.known[id(batch)][1]
        read = completed(self.model, batch)
        name, value = _run(self.model, read)
        mask = read.output_mask
        alike = mask is not None and value.dim() == 3 and mask.shape == value.shape[:2]
        if name == "spans" or not alike:
            mask = None  # outputs are of each sequence
        found = Target(read, name, value, mask)
        if value.nbytes <= self.room:
            self.room -= value.nbytes
            found = replace(found, value=value.cpu())
            self.known[id(batch)] = batch, found  # it lives on, and nothing else has its id
        return found


def losses(student: nn.Module, target: Target) -> Tensor:
    """Return the loss of each row, ``(rows,)`` float32, with gradients for the student.

    ============== ================================================== ================
    output         loss                                               row
    ============== ================================================== ================
    logits         ``KL(p ‖ q) = Σ p (log p − log q)``                token, or
                                                                      sequence
    spans          the same over the tokens of a sequence             start, and end
    labels         the same of each label: right, or not              label
    scores         ``mean (z − z')²``                                 sequence
    hidden states  ``1 − cos(m, m') + mean (h − h')²``, where m is    sequence
                   the mean of h over the tokens
    ============== ================================================== ================

    Unprimed and p: the dense model. Padding does not count. No labels are used. Raises InputError
    if the outputs of the two models have different shapes.
    """
    _, value = _run(student, target.batch)
    dense, mask = target.value.to(value.device), target.mask
    if value.shape != dense.shape:
        raise InputError(
            f"heal: the outputs of the two models must have one shape, got {tuple(value.shape)} "
            f"and {tuple(dense.shape)} of the dense model; name the model that was pruned as "
            "teacher"
        )
    mask = None if mask is None else mask.to(value.device)
    if target.name not in LOGITS:
        return _of_states(value.float(), dense.float(), mask)
    if mask is not None:
        value, dense = value[mask], dense[mask]
    if target.name == "labels":  # softmax([z, 0]) has the sigmoid of z
        value, dense = (torch.stack([z, torch.zeros_like(z)], -1) for z in (value, dense))
    value, dense = value.flatten(0, -2), dense.flatten(0, -2)
    if target.name == "scores":
        return (value.float() - dense.float()).square().mean(-1)
    return KLDivergence.apply(value, dense)


@torch.no_grad()
def mean_loss(student: nn.Module, teacher: Teacher, batches: Sequence[Batch]) -> float:
    """Return the mean of :func:`losses` over all rows of some batches, which ranks share."""
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(batches), world_size()):
        index = start + rank()  # beyond the end, a rank goes along with the others
        found = losses(student, teacher(batches[index % len(batches)]))
        if index < len(batches):
            sums[0] += float(found.sum(dtype=torch.float64))
            sums[1] += len(found)
    all_reduce(sums)
    return float(sums[0] / sums[1])


def _run(model: nn.Module, batch: Batch) -> tuple[str, Tensor]:
    outputs = model(**batch.to(device_of(model)).inputs)
    return output_of(model, outputs, batch.output_mask)


class KLDivergence(torch.autograd.Function):
    """``KL(p ‖ q)`` of each row of logits, with its gradient ``q − p`` by those of q.

    Both come from one softmax of some rows at a time: that of all rows would take several times the
    memory of the logits.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, target: Tensor) -> Tensor:
        """Return the divergences, ``(rows,)`` float32, of logits ``(rows, classes)``."""
        found, slope = [], torch.empty_like(value) if ctx.needs_input_grad[0] else None
        step = max(1, AT_ONCE // value.shape[-1])
        for at in range(0, len(value), step):
            rows = slice(at, at + step)
            log_q, log_p = (each[rows].float().log_softmax(-1) for each in (value, target))
            p = log_p.exp()
            found.append((p * log_p.sub_(log_q)).sum(-1))
            if slope is not None:
                slope[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(slope)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by the logits of q; that by p's is not needed."""
        (slope,) = ctx.saved_tensors
        return slope * gradient[:, None].to(slope.dtype), None


def _of_states(value: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    distance = (value - target).square().mean(-1)
    if value.dim() == 2:  # embeddings
        return 1 - functional.cosine_similarity(value, target, dim=-1) + distance
    weight = token_weights(value, mask)
    pooled = [(weight[..., None] * each).sum(1) for each in (value, target)]
    return 1 - functional.cosine_similarity(*pooled, dim=-1) + (weight * distance).sum(1)
