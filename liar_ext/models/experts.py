"""Mixtures of experts: what one expert's layers are, and what of a text reaches it.

A layer of experts keeps the weights of all of them in one parameter ``(experts, ...)`` per linear
layer. The router sends a token t to few experts, with a weight r, and the layer gives::

    y_t = Σ_e r_te (W_e x_te + b_e)        x_te = gate(U_e h_t)

An expert is a site of its own, whose consumer is its slice W_e. What the consumer's error costs in
y is weighted by r², and so are the sums over the tokens that reach the expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from liar_ext.models.family import Experts
from liar_ext.models.plan import SitePlan
from liar_ext.models.residual_stream import fit, narrow, select
from liar_ext.models.running import bias_name, layer_at, owner_of
from liar_ext.models.sites import Site
from liar_ext.system.errors import InputError


class Routed(NamedTuple):
    """What reaches one expert."""

    x: Tensor  # (routed, d_in): what its consumer reads
    token: Tensor  # (routed,) int64: which tokens these are, counting through all sequences
    weight: Tensor  # (routed,): the router's weight r of the expert
    tokens: int  # that the layer was given


def called_at(site: Site) -> str:
    """Return the path of the module that runs a site's consumer: its own, or all experts'."""
    return site.consumer if site.expert is None else site.consumer.rpartition(".")[0]


def router_of(model: nn.Module, site: Site) -> nn.Module:
    """Return the module that sends tokens to an expert."""
    return model.get_submodule(f"{site.path}.{site.wiring.experts.router}")


def choice_of(model: nn.Module, site: Site) -> tuple[Tensor, ...]:
    """Return what a router is called with beside the tokens: nothing, or a number per expert."""
    path = site.wiring.experts.choice
    found = getattr(*owner_of(model, f"{site.path}.{path}"), None) if path else None
    return () if found is None else (found,)


def by_expert(router: nn.Module, experts: int) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield what a router holds for each expert: its owner, name and the dimension."""
    for module in list(router.modules()):
        both = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in both:
            if experts in tensor.shape:
                yield module, name, tensor.shape.index(experts)


def refuse_experts(at: Sequence[Site], what: str, instead: str) -> None:
    """Raise InputError if a site is an expert, which ``what`` can't do; say what to do instead."""
    name = next((site.name for site in at if site.expert is not None), None)
    if name is not None:
        raise InputError(
            f"{what} a layer whose MLP is one linear layer after another, got {name}, an expert "
            f"whose weights are slices of a parameter; {instead}"
        )


def routed_input(model: nn.Module, site: Site, args: tuple) -> Routed:
    """Return what an expert's consumer reads of the tokens that the router sends there.

    ``args`` is what the module that holds the experts is called with: tokens ``(tokens, hidden)``,
    chosen experts ``(tokens, top_k)`` and their weights, likewise. Where the router scales what an
    expert reads, nothing scales what it gives: r = 1.
    """
    if site.wiring.experts.scales_input:
        own = _by_expert(site, args[0])[site.expert]
        token = own.any(-1).nonzero().flatten()
        return Routed(gated(model, site, own[token]), token, own.new_ones(len(token)), len(own))
    hidden, chosen, weights = args[:3]
    token, place = torch.where(chosen == site.expert)
    x = gated(model, site, hidden[token])
    return Routed(x, token, weights[token, place], len(hidden))


def routed_weights(site: Site, args: tuple) -> Tensor:
    """Return the weights r of the experts that each token is sent to, a row of them per token."""
    if site.wiring.experts.scales_input:
        return _by_expert(site, args[0]).any(-1).T
    return args[2]


def routed_output(site: Site, output: Tensor) -> Tensor:
    """Return what all experts give a token together, ``(tokens, hidden)``."""
    return _by_expert(site, output).sum(0) if site.wiring.experts.scales_input else output


def _by_expert(site: Site, rows: Tensor) -> Tensor:
    return rows.view(site.experts, -1, rows.shape[-1])


def gated(model: nn.Module, site: Site, hidden: Tensor) -> Tensor:
    """Return what an expert's consumer reads where the layer reads ``hidden``, by token."""
    (path,) = site.producers
    layer = layer_at(model, path, site.expert)
    out = hidden @ (layer.weight if site.wiring.transposed else layer.weight.T)
    out = out if layer.bias is None else out + layer.bias
    if site.wiring.experts.scales_input:  # Llama 4's experts have no method for it
        gate, up = out.chunk(2, -1)
        return layer.owner.act_fn(gate) * up
    return (layer.owner._apply_gate if layer.owner.has_gate else layer.owner.act_fn)(out)


@torch.no_grad()
def reroute(
    router: nn.Module, logits: Tensor, kept: Tensor, experts: Experts, choice: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Return weights and places in ``kept``, ``(tokens, top_k)``, of a router with fewer rows.

    It is the router's own code, which computes its logits from hidden features: it is given the
    logits as such, and rows of the identity as its weight. ``choice`` is what it is called with
    beside them, see :func:`choice_of`.
    """
    fewer, size = _light_copy(router), logits.shape[1]
    for module, name, dim in by_expert(fewer, size):  # such as a bias of the choice alone
        narrow(module, name, dim, kept)
    matrix, name = owner_of(fewer, experts.weight)
    rows = torch.eye(size, dtype=logits.dtype, device=logits.device)[kept]
    matrix._parameters[name] = nn.Parameter(rows, requires_grad=False)
    if matrix._parameters.get("bias") is not None:  # which the logits hold already
        zeros = rows.new_zeros(len(kept))
        matrix._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)
    fewer.hidden_dim, fewer.num_experts = size, len(kept)
    _, weights, places = fewer.forward(logits, *(each[kept] for each in choice))
    return weights, places


def _light_copy(module: nn.Module) -> nn.Module:
    """Return a copy whose modules are its own, with the tensors of the other."""
    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._modules = {name: _light_copy(child) for name, child in module._modules.items()}
    return copied


class Held(NamedTuple):
    """What a layer holds for each of its experts."""

    owner: nn.Module
    name: str  # of a parameter or buffer
    dim: int  # that counts experts
    scaled: bool  # whether it is of their consumers, and what an output is multiplied by goes there

    def without(self, value: Tensor, kept: Tensor, scales: Tensor | None) -> Tensor:
        """Return its value for the experts ``kept``, scaled."""
        value = select(value, self.dim, kept)
        if self.scaled and scales is not None:
            value.mul_(scales.to(value).view(-1, *[1] * (value.dim() - 1)))
        return value


def held_by_experts(model: nn.Module, site: Site) -> list[Held]:
    """Return all that the layer of an expert holds for its experts, if any: weights and router."""
    (experts, consumer), router = owner_of(model, site.consumer), router_of(model, site)
    both = consumer, bias_name(consumer)
    found = [Held(experts, n, 0, n in both) for n, _ in experts.named_parameters(recurse=False)]
    found += [Held(*each, False) for each in by_expert(router, site.experts)]
    if choice_of(model, site):
        path = f"{site.path}.{site.wiring.experts.choice}"
        found.append(Held(*owner_of(model, path), 0, False))
    return found


@torch.no_grad()
def keep_experts(model: nn.Module, site: Site, kept: Tensor, scales: Tensor | None) -> None:
    """Remove experts of a layer, and what the router has for them, in place.

    ``site`` is any expert of the layer, ``kept``, ascending, those that stay, and ``scales`` what
    their outputs are multiplied by, in their consumers; None: 1.
    """
    for each in held_by_experts(model, site):
        value = each.without(getattr(each.owner, each.name), kept, scales)
        setattr(each.owner, each.name, value)
        fit(each.owner)
    # The model counts experts for the loss that balances them.
    if getattr(model, "num_experts", None) == site.experts:
        model.num_experts = len(kept)


def check_count(name: str, count: int, units: str, plan: SitePlan) -> None:
    """Refuse a plan that counts other units than there are."""
    if plan.units != count:
        raise InputError(
            f"apply_plan: {name} has {count} {units}, the plan counts {plan.units}; is the model "
            "pruned already? Apply the plan to the dense model"
        )


def check_kept_experts(
    model: nn.Module, site: Site | None, name: str, plan: SitePlan, scales: Tensor | None
) -> None:
    """Refuse a plan of experts that doesn't fit a layer; ``site`` is its first expert, if any."""
    if site is None:
        raise InputError(
            f"apply_plan: the model has no experts at {name}; make a plan from this model"
        )
    check_count(name, site.experts, "experts", plan)
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
