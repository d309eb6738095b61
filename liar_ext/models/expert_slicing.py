"""Slice parameters that all experts of a layer share: to some experts, or to some channels each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.models.experts import bias_name, by_expert, choice_of, router_of
from liar_ext.models.residual_stream import select
from liar_ext.models.sites import Site
from liar_ext.plan import SitePlan


def select_by_expert(owner: nn.Module, name: str, dim: int, index: Tensor) -> None:
    """Let a parameter ``(experts, ...)`` hold slices of itself, in place.

    Parameters
    ----------
    owner : nn.Module
        Holds it.
    name : str
        Its name; one that isn't there is left out.
    dim : int
        Dimension that is sliced, counting that of the experts.
    index : Tensor
        ``(experts, kept)`` int64, per expert what stays.
    """
    old = getattr(owner, name, None)
    if old is None:
        return
    index = index.to(old.device)
    parts = [
        part.index_select(dim - 1, rows) for part, rows in zip(old.detach(), index, strict=True)
    ]
    setattr(owner, name, nn.Parameter(torch.stack(parts), requires_grad=old.requires_grad))


def keep_experts(model: nn.Module, site: Site, kept: Tensor, scales: Tensor | None) -> None:
    """Remove experts of a layer, and what the router has for them, in place.

    Parameters
    ----------
    model : nn.Module
        The model.
    site : Site
        Any expert of the layer.
    kept : Tensor
        ``(kept,)`` int64, ascending: experts that stay.
    scales : Tensor or None
        ``(kept,)``: what their outputs are multiplied by, in their consumers; None: 1.
    """
    owner, _, consumer = site.consumer.rpartition(".")
    experts, router = model.get_submodule(owner), router_of(model, site)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, select(parameter, 0, kept))
    held = list(by_expert(router, site.experts))
    for buffer in choice_of(model, site):
        path, _, name = f"{site.path}.{site.wiring.experts.choice}".rpartition(".")
        held.append((model.get_submodule(path), name, buffer, 0))
    for module, name, tensor, dim in held:
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, select(tensor, dim, kept))
        else:
            setattr(module, name, tensor.index_select(dim, kept.to(tensor.device)))
        if isinstance(module, nn.Linear):
            module.out_features = len(kept)
    if scales is not None:
        for name in (consumer, bias_name(consumer)):
            parameter = getattr(experts, name, None)
            if parameter is not None:
                parameter.mul_(scales.to(parameter).view(-1, *[1] * (parameter.dim() - 1)))
    # The model counts experts for the loss that balances them.
    if getattr(model, "num_experts", None) == site.experts:
        model.num_experts = len(kept)


def check_kept_experts(
    model: nn.Module, site: Site | None, name: str, plan: SitePlan, scales: Tensor | None
) -> None:
    """Refuse a plan of experts that doesn't fit a layer; ``site`` is its first expert, if any."""
    if site is None:
        raise InputError(
            f"apply_plan: the model has no experts at {name}; make a plan from this model"
        )
    if plan.units != site.experts:
        raise InputError(
            f"apply_plan: {name} has {site.experts} experts, the plan counts {plan.units}; is the "
            "model pruned already? Apply the plan to the dense model"
        )
    top_k = router_of(model, site).top_k
    if len(plan.kept) < top_k:
        raise InputError(
            f"apply_plan: {name} sends every token to {top_k} experts, the plan keeps "
            f"{len(plan.kept)}; keep at least {top_k}"
        )
    if scales is not None and scales.shape != (len(plan.kept),):
        raise InputError(
            f"apply_plan: {name} needs {len(plan.kept)} scales, one for each expert that stays, "
            f"got shape {tuple(scales.shape)}"
        )


def slice_channels(
    owner: nn.Module, producer: str, consumer: str, rows: Tensor, columns: Tensor, transposed: bool
) -> None:
    """Keep channels of the experts of a layer, as many of each: rows here, columns there.

    Parameters
    ----------
    owner : nn.Module
        The module that holds the experts.
    producer, consumer : str
        Names of its parameters.
    rows, columns : Tensor
        ``(experts, kept)`` int64: rows of the producer and of its bias, columns of the consumer.
    transposed : bool
        The last two dimensions are stored the other way round.
    """
    output, input_ = (2, 1) if transposed else (1, 2)
    select_by_expert(owner, producer, output, rows)
    select_by_expert(owner, bias_name(producer), 1, rows)
    select_by_expert(owner, consumer, input_, columns)
