"""Whole experts and blocks: what reaches an expert, and a model without some experts or blocks.

A layer of experts keeps the weights of all of them in one parameter ``(experts, ...)`` per linear
layer. The router sends a token t to few experts, with a weight r, and the layer gives::

    y_t = Σ_e r_te (W_e x_te + b_e)        x_te = gate(U_e h_t)

An expert is a site of its own, whose consumer is its slice W_e. What the consumer's error costs in
y is weighted by r², and so are the sums over the tokens that reach the expert.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liar_ext.models.family import BORROWED, Experts, Part
from liar_ext.models.layers import bias_name, fit, layer_at, narrow, owner_of, saved_tensors, select
from liar_ext.models.plan import SitePlan
from liar_ext.models.registry import family_of, skeleton
from liar_ext.models.running import Block, block_config, parts_of
from liar_ext.models.sites import Site, sites
from liar_ext.system.errors import InputError, refusing

PLAIN = bool | int | float | str | tuple | None
SHAPE = "shape of "
Number = tuple[nn.Module, str, int]  # a number that a module keeps, and what it becomes


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
    return tuple(getattr(owner, name) for owner, name in _choice(model, site))


def _choice(model: nn.Module, site: Site) -> Iterator[tuple[nn.Module, str]]:
    """Yield owner and name of what :func:`choice_of` returns."""
    if path := site.wiring.experts.choice:
        owner, name = owner_of(model, f"{site.path}.{path}")
        if getattr(owner, name, None) is not None:
            yield owner, name


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
    for module, name, dim in _per_expert(fewer, size):  # such as a bias of the choice alone
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


def _per_expert(router: nn.Module, experts: int) -> list[tuple[nn.Module, str, int]]:
    """Return what a router holds for each expert: its owner, name and the dimension."""
    return [
        (module, name, tensor.shape.index(experts))
        for module in router.modules()
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and experts in tensor.shape
    ]


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
    found += [Held(*each, False) for each in _per_expert(router, site.experts)]
    return [*found, *(Held(*each, 0, False) for each in _choice(model, site))]


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


def why_lent(model: nn.Module) -> str:
    """Return what blocks read of earlier ones beside hidden states; empty if nothing."""
    family = family_of(model)
    lent = family.lends and getattr(block_config(family, model.config), family.lends)
    return BORROWED if lent else ""


def why_no_chain(model: nn.Module, blocks: int) -> str:
    """Return why so many blocks are no chain that can be run one by one; empty if they are."""
    family = family_of(model)
    if reason := family.without.get("layerwise") or why_lent(model):
        return reason
    if family.parts:
        return "it has several stacks of blocks"
    known = {site.block for site in sites(model)} == set(range(blocks))
    return "" if known else "some of its blocks have no site"


def stack_of(model: nn.Module) -> tuple[Part, list[Block]]:
    """Return the only stack of blocks of a model; InputError if none of it can be left out."""
    family = family_of(model)
    part, blocks = parts_of(model, family)[0]
    counted = getattr(block_config(part, model.config), "num_hidden_layers", None)
    said, reason = getattr(model.config, "liar", None) or {}, why_no_chain(model, len(blocks))
    if family.repeats or "*" in part.blocks:
        reason = reason or "blocks share their weights"
    elif counted != len(blocks):
        reason = reason or "no field of its config counts its blocks"
    elif said.get("layers") == "unequal":
        reason = reason or "its layers are unequal already; remove blocks first"
    if reason:
        raise InputError(f"blocks: this {family.name!r} can lose none: {reason}")
    return part, blocks


def count_blocks_kept(model: nn.Module, keep: float) -> int:
    """Return how many blocks stay: at most the fraction ``keep``; InputError if that is none."""
    _, blocks = stack_of(model)
    count = math.floor(keep * len(blocks) + 1e-9)
    if count < 1:
        raise InputError(
            f"blocks: {keep:.4g} of {len(blocks)} blocks is less than one; raise keep_blocks"
        )
    return count


def check_block_count(model: nn.Module, keep: float) -> None:
    """Raise InputError if neither the first blocks nor evenly spread ones can stay alone."""
    count, total = count_blocks_kept(model, keep), len(stack_of(model)[1])
    attending = attending_blocks(model)
    if count == 1 and attending and 0 not in attending:
        raise InputError(
            f"blocks: {keep:.4g} of {total} blocks leaves the first one, which has no attention, "
            "and no cache counts tokens; raise keep_blocks"
        )
    try:
        renumbered(model, [place * total // count for place in range(count)])
    except InputError:
        renumbered(model, range(count))


def attending_blocks(model: nn.Module) -> set[int]:
    """Return the blocks of which one must stay for a cache to count tokens: all, but of hybrids."""
    from transformers.cache_utils import CacheLayerMixin, DynamicCache

    part, _ = stack_of(model)
    layers = DynamicCache(config=block_config(part, model.config)).layers
    return {index for index, each in enumerate(layers) if isinstance(each, CacheLayerMixin)}


def keep_blocks(model: nn.Module, kept: Sequence[int], numbers: Sequence[Number]) -> None:
    """Remove all other blocks, in place; config and :func:`renumbered`'s numbers follow."""
    part, blocks = stack_of(model)
    _shorten(part, model.config, kept, len(blocks))
    for module, name, value in numbers:
        setattr(module, name, value)
    # The list stays the same module.
    held = model.get_submodule(blocks[0][0].rpartition(".")[0])._modules
    left = [blocks[index][1] for index in kept]
    held.clear()
    held.update({str(index): block for index, block in enumerate(left)})


def _shorten(part: Part, config: Any, kept: Sequence[int], count: int) -> None:
    """Let a config say that these of ``count`` blocks are all; lists with an item each follow."""
    config = block_config(part, config)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, type(value)(value[index] for index in kept))
    config.num_hidden_layers = len(kept)
    if getattr(config, "stage_names", None):  # of a backbone, which gives what its last block does
        config.stage_names = config.stage_names[: len(kept) + 1]
        config.set_output_features_output_indices(None, None)


def renumbered(model: nn.Module, kept: Sequence[int]) -> list[Number]:
    """Return the numbers to change: of its place in a block, and of blocks outside of them.

    What the config builds without the other blocks is compared with what it builds with all. If
    anything else differs, as a block of another kind would, InputError is raised.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.cache_utils import DynamicCache

    part, blocks = stack_of(model)
    config = copy.deepcopy(model.config)
    _shorten(part, config, kept, len(blocks))
    what = f"blocks: no config of {model.config.model_type!r} says these blocks alone"
    with refusing(what, "leave keep_blocks out", ValueError, StrictDataclassError):
        config = type(config).from_dict(config.to_dict())  # as a loader reads it
    kind = f"block {kept[0]} of this {family_of(model).name!r}"
    what = f"blocks: {kind} keeps nothing of earlier tokens, so it can't be the first"
    with refusing(what, "keep an earlier one too", AttributeError, ValueError):
        DynamicCache(config=block_config(part, config)).get_seq_length()  # as models count tokens
    pairs = _pairs(model, kept, skeleton(type(model), model.config), skeleton(type(model), config))
    numbers: list[Number] = []
    for module, dense, fewer, moved in pairs:
        one, two = _facts(dense), _facts(fewer)
        # What served kinds of blocks that are all gone may stay, be it no tensor of a folder.
        names = {*two, *(name for name in one if name.startswith(SHAPE))}
        for name in sorted(n for n in names if one.get(n) != two.get(n)):
            if (one.get(name), two.get(name)) != moved:
                raise InputError(
                    f"blocks: the config of {model.config.model_type!r} builds others without the "
                    f"blocks that go: {name} of a {type(dense).__name__} is {two.get(name)}, not "
                    f"{one.get(name)}; leave keep_blocks out"
                )
            numbers.append((module, name, two[name]))
    return numbers


def _pairs(
    model: nn.Module, kept: Sequence[int], dense: nn.Module, fewer: nn.Module
) -> Iterator[tuple[nn.Module, nn.Module, nn.Module, tuple[int, int]]]:
    """Yield each module of a model that stays, and what it is in two others.

    The last are the numbers that a place of its block, or the count of all, has in these.
    """
    family = family_of(model)
    own, before, after = (parts_of(each, family)[0][1] for each in (model, dense, fewer))
    inside = {module for _, block in own for module in block.modules()}
    one, two = dict(dense.named_modules()), dict(fewer.named_modules())
    for path, module in model.named_modules():
        if module not in inside and path in one and path in two:
            yield module, one[path], two[path], (len(before), len(after))
    for place, index in enumerate(kept):
        trio = own[index][1], before[index][1], after[place][1]
        names = [[name for name, _ in block.named_modules()] for block in trio]
        if not names[0] == names[1] == names[2]:
            raise InputError(
                f"blocks: the config of {model.config.model_type!r} builds other layers in block "
                f"{index} once others are gone; leave keep_blocks out"
            )
        for each in zip(*(block.modules() for block in trio), strict=True):
            yield *each, (index, place)


def _facts(module: nn.Module) -> dict[str, Any]:
    """Return the plain values that a module keeps, its class, and the shapes of what is saved."""
    own = {n: v for n, v in vars(module).items() if isinstance(v, PLAIN) and n != "training"}
    shapes = {f"{SHAPE}{name}": tuple(each.shape) for name, each in saved_tensors(module).items()}
    return own | shapes | {"class": type(module).__name__}
