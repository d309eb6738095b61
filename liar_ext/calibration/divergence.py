"""What a model's outputs say: divergence from the dense model, and gradients of a loss by unit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from liar_ext.calibration.batches import (
    LABELS,
    Batch,
    Batches,
    completed,
    read_batch,
    read_batches,
)
from liar_ext.calibration.taps import watched
from liar_ext.models.running import (
    DECODER_IDS,
    IGNORED,
    LOGITS,
    agree,
    check_alike,
    complete_inputs,
    device_of,
    evaluating,
    log_probabilities,
    output_of,
    token_weights,
)
from liar_ext.models.sites import Site, get_consumer_weight
from liar_ext.models.whole import refuse_experts
from liar_ext.system.distributed import gather, rank, world_size
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.progress import Bar

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

    The dense model, in evaluation mode, is run now. Outputs are compared at so many ``positions``,
    evenly spread over the sequences, or at all of them but padding. ``name`` says what outputs are,
    see :func:`liar_ext.models.running.output_of`.
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

        With ``finite_only`` rows where that model overflows count as the mean of the others do, as
        far as there are others.
        """
        return self.divergence_of(self.outputs(pruned), finite_only=finite_only)

    def outputs(self, model: nn.Module) -> Tensor:
        """Return the rows of a model, which is run for it: logits or hidden states."""
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
    default some ``MOST_ROWS`` in all. ``outputs`` has those of this rank by batch.
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


@dataclass(frozen=True)
class SiteGradients:
    """What the loss says of the units of one site.

    A unit owns, in each producer, its rows with their biases, and in the consumer its columns.
    ``g = ∂L/∂w`` is the gradient of the mean loss ``L`` over all predicted tokens, or labels.

    Parameters
    ----------
    signed : Tensor
        ``Σ_w w·g`` per layer and unit, ``(layers, units)`` float64: to first order, what the loss
        falls by if those weights go. Layers are the site's producers, then its consumer.
    absolute : Tensor
        ``Σ_w |w·g|``, ``(layers, units)`` float64.
    fisher : Tensor
        ``(1/S) Σ_s (∂L_s/∂m_u)²`` at ``m = 1`` over the S sequences, ``(units,)`` float64. The mask
        m multiplies the consumer's input, so ``∂L_s/∂m_u = Σ_t Σ_{j∈u} x_tj · ∂L_s/∂x_tj``; L_s
        is the loss of sequence s alone, summed over its items.
    """

    signed: Tensor
    absolute: Tensor
    fisher: Tensor

    def to(self, device: torch.device) -> SiteGradients:
        """Return the same on another device."""
        return SiteGradients(*(each.to(device) for each in vars(self).values()))


def collect_gradients(
    model: nn.Module, batches: Batches, at: Sequence[Site]
) -> dict[str, SiteGradients]:
    """Run the model forward and backward over ``batches``; return the statistics by site name.

    A causal language model is asked for the next token: ``L = −Σ_t log p(x_{t+1} | x_1 … x_t)``,
    targets from ``labels``, else from ``input_ids``, without padding. Any other model needs
    ``labels`` (or ``start_positions``), from which its own head computes the loss. The model stays
    as it is. Memory: a gradient of all weights of the sites and their sum, in float32 or wider.
    """
    check_owned(at)
    device = device_of(model)
    owned = [(site, *pair) for site in at for pair in _owned(model, site)]
    parameters = [each for *_, each in owned]
    wide = [torch.promote_types(each.dtype, torch.float32) for each in parameters]
    sums = [each.new_zeros(each.shape, dtype=t) for each, t in zip(parameters, wide, strict=True)]
    fisher = {
        site.name: get_consumer_weight(model, site).new_zeros(site.units, dtype=torch.float64)
        for site in at
    }
    items = sequences = 0
    with evaluating(model), _tracked(model, parameters, at) as read:
        for index, batch in enumerate(read_batches(Bar(batches, desc="gradients"))):
            batch = batch.to(device)
            check_loss(model, batch)
            failure = f"gradients: {type(model).__name__} can't compute the loss of batch {index}"
            with refusing(failure, "give labels as its head takes them", IndexError, ValueError):
                loss, count = _summed_loss(model, batch)
            if not torch.isfinite(loss):
                raise InputError(
                    f"gradients: the loss must be finite, got {loss.item()} in batch {index}; "
                    "load the model in a wider dtype"
                )
            seen = [x for site in at for x in read[site.name]]
            wanted = [*seen, *parameters]
            found = iter(torch.autograd.grad(loss, wanted, materialize_grads=True))
            for site in at:  # what repeats has several runs
                runs = [_by_mask(x, next(found), batch, site.width) for x in read.pop(site.name)]
                fisher[site.name] += sum(runs).square().sum(0)
            for total, gradient in zip(sums, found, strict=True):
                total += gradient
            items, sequences = items + count, sequences + len(batch)
    if not items:
        raise InputError(
            f"gradients: {sequences} sequences hold nothing to predict; give a list of batches, "
            "not an iterator that was read before, with at least 2 tokens or a label each"
        )
    layers: dict[str, dict[str | None, Tensor]] = {site.name: {} for site in at}
    for (site, path, parameter), total in zip(owned, sums, strict=True):
        product = parameter.detach().to(total.dtype) * total / items
        both = torch.stack([_per_unit(site, each, path) for each in (product, product.abs())])
        own = layers[site.name]
        own[path] = own[path] + both if path in own else both
    stacked = {name: torch.stack([*own.values()], 1) for name, own in layers.items()}
    return {name: SiteGradients(*stacked[name], fisher[name] / sequences) for name in stacked}


def check_owned(at: Sequence[Site]) -> None:
    """Raise InputError if sites are of experts, whose weights are no parameters of their own."""
    what = "gradients: criteria that need gradients need"
    refuse_experts(at, what, "take one that runs the model forward only, such as wifv")


def check_loss(model: nn.Module, batch: Mapping[str, Tensor] | Tensor | Batch) -> None:
    """Raise InputError unless ``model`` can compute a loss for ``batch``."""
    headless = not any(name in inspect.signature(model.forward).parameters for name in LABELS)
    if headless or not (read_batch(batch).labels or _asks_next(model)):
        lacks = "has no head" if headless else "is no causal language model and got no labels"
        raise InputError(
            f"gradients: criteria that need gradients need a loss, and {type(model).__name__} "
            f"{lacks}; give a model with a head and batches with labels, or take a criterion that "
            "runs the model forward only, such as wifv"
        )


def _by_mask(x: Tensor, gradient: Tensor, batch: Batch, width: int) -> Tensor:
    """Return ``Σ_t Σ_{j∈u} x_stj g_stj``, ``(sequences, units)`` float64."""
    both = (a.detach().reshape(len(batch), -1, a.shape[-1]) for a in (x, gradient))
    sums = [(one.double() * other.double()).sum(0) for one, other in zip(*both, strict=True)]
    return torch.stack(sums).unflatten(1, (-1, width)).sum(2)


def _summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    if not _asks_next(model):  # the head averages its loss over a batch
        inputs = complete_inputs(model, batch.inputs, batch.labels)
        loss = model(**inputs, **batch.labels).loss
        labels = next(iter(batch.labels.values()))
        # Classes and tokens are counted one by one; a row of numbers is one item.
        count = len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())
        return loss * count, count
    mask, targets = batch.mask, batch.labels.get("labels", batch.inputs["input_ids"])
    counts = targets[:, 1:] != IGNORED
    if mask is not None:
        counts &= mask[:, 1:] & mask[:, :-1]
    logits = model(**batch.inputs).logits[:, :-1][counts]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, targets[:, 1:][counts], reduction="sum"), len(logits)


def _asks_next(model: nn.Module) -> bool:
    """Tell whether the loss is that of the next token; a decoder of another text needs labels."""
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def _owned(model: nn.Module, site: Site) -> Iterator[tuple[str | None, nn.Parameter]]:
    """Yield the parameters in which units own something, by producer, and None for the consumer."""
    for path in site.producers:
        layer = model.get_submodule(path)
        yield from ((path, each) for each in (layer.weight, layer.bias) if each is not None)
    yield None, model.get_submodule(site.consumer).weight


def _per_unit(site: Site, values: Tensor, producer: str | None) -> Tensor:
    """Sum values of a producer's weight or bias, or of the consumer's weight, to ``(units,)``."""
    if values.dim() == 2:
        # Outputs of a producer and inputs of the consumer belong to units; sum over the other side.
        reads = producer is None
        values = values.sum(int(reads == site.wiring.transposed), dtype=torch.float64)
    values = values.double()
    if producer is None:
        return values.view(site.units, -1).sum(1)
    units = site.row_units(producer, len(values))
    # By an index, as sums into places of their own aren't deterministic on every device.
    order = units.argsort(stable=True)[int((units < 0).sum()) :]  # no unit owns those below 0
    return values[order.to(values.device)].view(site.units, -1).sum(1)


@contextmanager
def _tracked(
    model: nn.Module, parameters: Sequence[nn.Parameter], at: Sequence[Site]
) -> Iterator[dict[str, list[Tensor]]]:
    """Track gradients of ``parameters`` alone, and give what each consumer reads, by site name."""
    read: dict[str, list[Tensor]] = {}

    def note(name: str):
        return lambda arguments, _: read.setdefault(name, []).append(arguments[0])

    with torch.inference_mode(False), ExitStack() as stack:  # with gradients
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        if hasattr(model.config, "problem_type"):  # which a head finds out from its labels
            stack.callback(setattr, model.config, "problem_type", model.config.problem_type)
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for site in at:
            stack.enter_context(watched(model.get_submodule(site.consumer), note(site.name)))
        yield read
