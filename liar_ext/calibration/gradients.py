"""Gradient statistics of units, for criteria with ``needs="gradient"``: one backward pass.

The loss is that of next-token prediction, or what the model's head computes from ``labels``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from liar_ext.calibration.batches import LABELS, Batch, Batches, read_batch, read_batches
from liar_ext.calibration.taps import watched
from liar_ext.models.experts import refuse_experts
from liar_ext.models.running import IGNORED, complete_inputs, device_of, evaluating
from liar_ext.models.sites import Site, get_consumer_weight
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar


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

    Batches are as for :func:`liar_ext.calibrate`. A causal language model is asked for the next
    token: ``L = −Σ_t log p(x_{t+1} | x_1 … x_t)``, targets from ``labels`` where the batch has
    them, else from ``input_ids``; padding is neither asked nor asked for. Any other model needs
    ``labels`` (or ``start_positions``), from which its own head computes the loss. InputError is
    raised if no loss can be computed, or it is not finite, or there is nothing to predict.

    Weights, ``.grad``, ``requires_grad`` and mode of the model are as they were afterwards. Memory:
    beyond it, one gradient of all weights of the sites and their running sum in float32 (float64
    for a float64 model), and the activations of one batch.
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
    """Raise InputError unless gradients of what the units of all sites own can be collected."""
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
    if not _asks_next(model):
        return _head_loss(model, batch)
    ids, mask = batch.inputs["input_ids"], batch.mask
    targets = batch.labels.get("labels", ids)
    if targets.shape != ids.shape:
        raise InputError(
            f"gradients: labels of a causal language model must have the shape of input_ids, "
            f"{tuple(ids.shape)}, got {tuple(targets.shape)}"
        )
    counts = targets[:, 1:] != IGNORED
    if mask is not None:
        counts &= mask[:, 1:] & mask[:, :-1]
    logits = model(**batch.inputs).logits[:, :-1][counts]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, targets[:, 1:][counts], reduction="sum"), len(logits)


def _asks_next(model: nn.Module) -> bool:
    """Tell whether the loss is that of the next token; a decoder of another text needs labels."""
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def _head_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the loss that the model's head averages over a batch, as a sum."""
    inputs = complete_inputs(model, batch.inputs, batch.labels)
    loss = getattr(model(**inputs, **batch.labels), "loss", None)
    if loss is None:
        raise InputError(
            f"gradients: {type(model).__name__} gave no loss; give a model with a head"
        )
    labels = next(iter(batch.labels.values()))
    # Classes and tokens are counted one by one; a row of numbers is one item.
    count = len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())
    return loss * count, count


def _owned(model: nn.Module, site: Site) -> Iterator[tuple[str | None, nn.Parameter]]:
    """Yield the parameters in which units own something, by producer, and None for the consumer."""
    for path in site.producers:
        layer = model.get_submodule(path)
        yield from ((path, each) for each in (layer.weight, layer.bias) if each is not None)
    yield None, model.get_submodule(site.consumer).weight


def _per_unit(site: Site, values: Tensor, producer: str | None) -> Tensor:
    """Sum the values of a producer's weight or bias, or of the consumer's weight, to ``(units,)``.

    Values of rows that no unit owns aren't counted.
    """
    if values.dim() == 2:
        # Outputs of a producer and inputs of the consumer belong to units; sum over the other side.
        reads = producer is None
        values = values.sum(int(reads == site.wiring.transposed), dtype=torch.float64)
    values = values.double()
    if producer is None:
        return values.view(site.units, -1).sum(1)
    units = site.row_units(producer, len(values))
    # By an index, as sums into places of their own aren't deterministic on every device.
    order = units.argsort(stable=True)[int((units < 0).sum()) :]
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
