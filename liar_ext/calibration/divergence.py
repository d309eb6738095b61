"""How far the outputs of a pruned model are from those of the dense one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch, Batches, completed, read_batch, read_batches
from liar_ext.models.outputs import (
    LOGITS,
    agree,
    check_alike,
    log_probabilities,
    output_of,
    token_weights,
)
from liar_ext.models.running import DECODER_IDS, device_of, evaluating
from liar_ext.system.distributed import gather, rank, world_size
from liar_ext.system.errors import InputError

# Logits that are compared at once: 16 rows of 50,000 stay in a processor's caches.
CHUNK = 16 * 50_000
# Rows of outputs that are held of the dense model: of 50,000 float32 logits they take 400 MiB.
MOST_ROWS = 2048


class DenseOutputs:
    """What the dense model gives for one batch, to tell how far pruned models are from it.

    With logits the divergence of a row, a token or a sequence, is ``KL(p ‖ q) = Σ p (log p −
    log q)`` in nats, p the dense model's distribution and q the pruned one's, summed over labels
    that are right or not by themselves. Of scores it is ``½ |z − z'|²``. Without logits it is ``½
    |h − h'|² / |h|²`` of embeddings, or of the last hidden state of a token, and as much again of
    the mean over the tokens of its sequence, which encoders are used for: the same to second order
    but for its scale. Rows where the dense output isn't finite are left out.

    The dense model, in evaluation mode, is run now. Padding doesn't count. Outputs are compared at
    as many ``positions``, evenly spread over the sequences, or at all of them. ``name`` says what
    outputs are, see :func:`liar_ext.models.outputs.output_of`.
    """

    def __init__(
        self,
        dense: nn.Module,
        batch: Mapping[str, Tensor] | Tensor | Batch,
        positions: int | None = None,
    ) -> None:
        self._batch = completed(dense, read_batch(batch))
        inputs = self._batch.inputs
        # The outputs are those of the decoder, if there is one.
        ids = inputs.get(DECODER_IDS, inputs.get("input_ids"))
        self._positions = _spread(ids, self._batch.output_mask, positions)
        self._usable: Tensor | None = None
        self.name, rows = self._run(dense)
        self.has_logits = self.name in LOGITS
        self._has_odds = self.has_logits and self.name != "scores"
        usable = torch.isfinite(rows).all(-1)
        if not usable.all():
            self._usable, rows = usable, rows[usable]
        rows = rows.float()
        self._shape = rows.shape
        # (rows, features): outputs, or log_probabilities of them.
        self.dense = log_probabilities(self.name, rows) if self._has_odds else rows

    def __len__(self) -> int:
        return len(self.dense)

    def divergence(self, pruned: nn.Module, *, finite_only: bool = False) -> float:
        """Return the sum over rows of the divergence of a model, which is run for it.

        With ``finite_only`` rows where that model overflows count as the mean of the others do,
        which serves to compare sites; if all do, or without it, the sum is not finite either.
        """
        return self.divergence_of(self.outputs(pruned), finite_only=finite_only)

    def outputs(self, model: nn.Module) -> Tensor:
        """Return the rows of a model, which is run for it: logits or hidden states.

        InputError is raised if they are not what the dense model puts out.
        """
        name, rows = self._run(model)
        check_alike(model, (name, rows.shape), (self.name, self._shape))
        return rows

    def divergence_of(self, rows: Tensor, *, finite_only: bool = False) -> float:
        """Return :meth:`divergence` of the model whose :meth:`outputs` these are."""
        total = self._sum(self.dense, rows)
        if not finite_only or math.isfinite(total):
            return total
        finite = torch.isfinite(rows).all(-1)
        if not finite.any():
            return math.nan
        return self._sum(self.dense[finite], rows[finite]) * len(self) / int(finite.sum())

    def _sum(self, dense: Tensor, rows: Tensor) -> float:
        """Return the sum of the divergence of rows from those of the dense model."""
        total, at_once = 0.0, max(1, CHUNK // dense.shape[-1])
        for p, q in zip(dense.split(at_once), rows.split(at_once), strict=True):
            q = q.to(p)
            if self._has_odds:
                each = torch.linalg.vecdot(p.exp(), p - log_probabilities(self.name, q))
            else:
                size = 1.0 if self.has_logits else p.square().sum(-1)
                each = 0.5 * (p - q).square().sum(-1) / size
            total += float(each.sum())
        return total

    def same(self, rows: Tensor) -> int:
        """Count the rows whose most likely class is that of the dense model, or all labels."""
        return int(agree(self.name, self.dense, rows).sum())

    def metric(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what a small change of a model's outputs does to the divergence.

        With J what they change by, less its mean under the third that is returned if there is one,
        the divergence changes by ``Σ slope · J + ½ Σ (root · J)²``: ``q − p``, ``√q`` and q of
        classes, ``q − p`` and ``√(q (1 − q))`` of labels, ``z' − z`` and 1 of scores, ``(h' − h) /
        |h|²`` and ``1 / |h|`` of hidden states.
        """
        if self.name == "labels":
            q = rows.sigmoid()
            return q - self.dense[:, : q.shape[-1]].exp(), (q * (1 - q)).sqrt(), None
        if self._has_odds:
            q = rows.softmax(-1)
            return q - self.dense.exp(), q.sqrt(), q
        size = self.dense.norm(dim=-1, keepdim=True)
        size = torch.ones_like(size) if self.has_logits else size
        return (rows - self.dense) / size.square(), 1 / size, None

    def _run(self, model: nn.Module) -> tuple[str, Tensor]:
        """Return the name of the outputs, and them, (rows, features)."""
        device = device_of(model)
        batch = self._batch.to(device)
        mask, at, extra = batch.output_mask, self._positions, {}
        if at is not None and "logits_to_keep" in inspect.signature(model.forward).parameters:
            extra["logits_to_keep"] = at.to(device)
        outputs = model(**batch.inputs, **extra)
        name, value = output_of(model, outputs, mask)
        if name == "spans":  # two of a sequence
            at = mask = None
        mean = None
        if name == "last_hidden_state" and value.dim() == 3:
            weight = token_weights(value, mask)[..., None]
            mean = (weight * value.float()).sum(1, keepdim=True)
        if at is not None and value.dim() == 3:
            value = value if value.shape[1] == len(at) else value[:, at]
            mask = None if mask is None else mask[:, at]
        if mean is not None:  # beside each token, that of its sequence
            value = torch.stack([value, mean.expand_as(value)], 2)
        if mask is not None and value.dim() > 2 and mask.shape == value.shape[:2]:
            value = value[mask.to(value.device)]
        rows = value.flatten(0, -2)
        rows = rows if self._usable is None else rows[self._usable.to(rows.device)]
        return name, rows


class Divergence:
    """How far a pruned model is from the dense one, of which only outputs are held.

    Ranks share the ``batches``. Outputs are compared at ``positions`` spread over each sequence, by
    default some ``MOST_ROWS`` in all. ``outputs`` has those of this rank by batch. If there is no
    batch, InputError is raised.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, batches: Batches, positions: int | None = None) -> None:
        batches = list(read_batches(batches))
        sequences = sum(map(len, batches))
        if not sequences:
            raise InputError("certify: needs at least one batch, got none; give more text")
        positions = positions or max(1, MOST_ROWS // sequences)
        self.outputs = {}
        with evaluating(dense):
            for index in range(rank(), len(batches), world_size()):
                self.outputs[index] = DenseOutputs(dense, batches[index], positions)

    @torch.no_grad()
    def of(self, pruned: nn.Module, *, finite_only: bool = False) -> dict[str, float]:
        """Return ``divergence`` per row, and ``rows``, the tokens or sequences compared.

        See :meth:`DenseOutputs.divergence`: nats where there are logits.
        """
        with evaluating(pruned):
            own = {
                at: (each.divergence(pruned, finite_only=finite_only), len(each))
                for at, each in self.outputs.items()
            }
        found = {at: each for share in gather(own) for at, each in share.items()}
        total = sum(found[at][0] for at in sorted(found))
        rows = sum(found[at][1] for at in found)
        return {"divergence": total / rows if rows else math.nan, "rows": rows}


def _spread(ids: Tensor | None, mask: Tensor | None, count: int | None) -> Tensor | None:
    """Return ``count`` positions spread evenly over the tokens; None if there are no more."""
    if ids is None or count is None:
        return None
    real = torch.arange(ids.shape[1], device=ids.device)
    if mask is not None:
        real = real[mask.any(0)]
    if len(real) <= count:
        return None
    return real[((torch.arange(count, device=ids.device) + 0.5) * len(real) / count).long()]
