"""Apply a plan to a model: slice its modules in place.

Nothing is masked and no number is computed. Of a site that keeps the units K::

    producers   W ← W[rows of K, :]   b ← b[rows of K]
    consumer    W ← W[:, columns of K], or the reconstructed weight that is given

The experts of a layer are sliced together, each to channels of its own. The head counts that
``forward`` reads follow; the size of a head stays. Whole blocks go first, and then hidden features:
:func:`liar_ext.models.residual_stream.slice_hidden`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from liar_ext.models.layers import bias_name, layer_at, layer_of, narrow, owner_of, weight_of
from liar_ext.models.liar_loader import select_heads, set_config_number
from liar_ext.models.plan import Budget, Plan, SitePlan, sites_left
from liar_ext.models.registry import type_of
from liar_ext.models.residual_stream import Weights, hidden_of, slice_hidden
from liar_ext.models.sites import CROSS, Site, get_consumer_bias, head_axis, sites, teams_of
from liar_ext.models.whole import (
    check_count,
    keep_blocks,
    keep_experts,
    renumbered,
    router_of,
    stack_of,
)
from liar_ext.system.errors import InputError

# transformers multiplies all experts of a layer at once, by a kernel that takes rows of a multiple
# of 16 bytes only: 8 channels of two bytes.
GROUPED_STEP = 8
DENSE = "dense."  # before the name of a site: as it is called before blocks go


@torch.no_grad()
def apply_plan(
    model: nn.Module,
    plan: Plan,
    weights: Weights | None = None,
    *,
    blocks: Collection[int] | None = None,
) -> None:
    """Remove from a model what the plan doesn't keep, in place.

    Everything is checked before anything changes. New parameters keep dtype, device and
    ``requires_grad``. The config still says the dense sizes: save the model with
    :func:`liar_ext.save_pruned`, which writes the new ones, as every loader refuses a folder of
    ``model.save_pretrained`` after ``apply_plan`` alone. After :func:`liar_ext.prune` none does.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that the plan was made for.
    plan : Plan
        Kept units per site; a site that it doesn't name keeps everything.
    weights : mapping of str to (Tensor, Tensor or None), optional
        New consumer weight, ``(d_out, n_kept · width)``, and bias, ``(d_out,)``, by site name. A
        site without an entry keeps the columns of its units, which is plain dropping. Of a layer
        that loses experts, by its name, what the outputs of those that stay are multiplied by,
        ``(kept,)``. If blocks go, by ``dense.`` and the name that a site has before that, what its
        consumer is set to first. With hidden features, d_out is the number of them that
        stay, and weights of norms and readers come by path, from
        :func:`liar_ext.reconstruction.hidden_size.narrow`.
    blocks : collection of int, optional
        Slice these blocks alone, and leave the others for a later call with the same plan.

    Raises
    ------
    InputError
        If the plan is for another model type, names a site that the model lacks, counts other
        units than the model has (a model that is pruned already, for one), keeps unequally many
        query heads per KV group, or channels per expert of a layer, or a weight has another shape.

    Notes
    -----
    If a plan gives a bias to a consumer of a family that has a config flag for it, every layer that
    the flag governs gains one, zero except for the consumers', as the stock class builds them.
    """
    found, weights = _by_name(model, plan), dict(weights or {})
    refits: list[tuple[Site, tuple[Tensor, Tensor | None]]] = []
    if plan.blocks is not None:
        check_count("the model", len(stack_of(model)[1]), "blocks", plan.blocks)
        numbers = renumbered(model, plan.blocks.kept)
        dense = [site for name, site in found.items() if f"{DENSE}{name}" in weights]
        refits = [(site, weights.pop(f"{DENSE}{site.name}")) for site in dense]
        for site, (weight, _) in refits:
            _check_shape(f"weight of {site.name}", weight, (site.d_out, site.d_in))
        found = {n: replace(s, name=n) for n, s in sites_left(found, plan.blocks).items()}
    gaining = (found[name] for name, at in plan.sites.items() if at.bias and name in found)
    flags = {site.wiring.bias_flag for site in gaining} - {None}  # which hold for all blocks
    if blocks is not None:
        here = {name: site for name, site in found.items() if site.block in blocks}
        # A site that the model lacks stays, to be refused by name.
        planned = {n: each for n, each in plan.sites.items() if n in here or n not in found}
        found, plan = here, replace(plan, sites=planned)
    layers = _hidden_layers(model, plan, weights)
    scales = {name: weights.pop(name)[0] for name in plan.experts if name in weights}
    for name, each in scales.items():
        _check_shape(f"scales of {name}", each, (len(plan.experts[name].kept),))
    _check(model, found, plan, {name: weights[name] for name in weights if name not in layers})
    for site, refit in refits:
        _set_consumer(model, site, *refit)
    if plan.blocks is not None:
        keep_blocks(model, plan.blocks.kept, numbers)
        found = _by_name(model, plan, found)
    if plan.hidden is not None:
        slice_hidden(model, plan.hidden.kept, layers)
    for name, site_plan in plan.experts.items():
        kept = torch.tensor(site_plan.kept, device="cpu")
        keep_experts(model, found[f"{name}.0"], kept, scales.get(name))
    if plan.experts:
        found = _by_name(model, plan, found)
    _grow_biases(model, found, plan, flags)
    for team in teams_of(list(found.values())).values():
        _slice_team(model, team, plan)
    found = _by_name(model, plan, found)
    for name in plan.sites.keys() & weights.keys():
        _set_consumer(model, found[name], *weights[name])
    for site in found.values():
        _patch_numbers(model, site)


def _by_name(model: nn.Module, plan: Plan, some: Collection[str] | None = None) -> dict[str, Site]:
    """Return the sites of a model as they are now, or those of ``some`` names."""
    at = sites(model, attn_unit=plan.attn_unit)
    return {site.name: site for site in at if some is None or site.name in some}


def unit_rows(site: Site, producer: str, kept: Sequence[int], rows: int) -> Tensor:
    """Return which of the ``rows`` of a site's producer stay with the units ``kept``."""
    units = site.row_units(producer, rows)
    return torch.isin(units, torch.tensor([-1, *kept], device="cpu")).nonzero().flatten()


def unit_slices(
    model: nn.Module, site: Site, kept: Sequence[int]
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield parameter, dimension and slices that stay, of all that belongs to the units of a site.

    The parameter is a path, which the model may lack if it is a bias.
    """
    one, output = site.expert is None, int(site.wiring.transposed)
    ahead = int(not one)  # parameters of all experts have one dimension more, in front
    for path in site.producers:
        size = layer_at(model, path, site.expert).weight.shape[output]
        rows = unit_rows(site, path, kept, size)
        yield f"{path}.weight" if one else path, ahead + output, rows
        yield f"{path}.bias" if one else bias_name(path), ahead, rows
    for path, features, columns in site.reads:
        size = layer_at(model, path, site.expert).weight.shape[1 - output]
        stays = torch.ones(size, dtype=torch.bool, device="cpu")
        stays[columns] = torch.isin(features, site.features(kept))
        yield f"{path}.weight" if one else path, ahead + 1 - output, stays.nonzero().flatten()
    for each in site.wiring.per_head:
        path = f"{site.path}.{each}"
        owner, name = owner_of(model, path)
        if (held := getattr(owner, name)) is not None:
            axis = head_axis(model.get_submodule(site.path), each)
            yield path, axis, unit_rows(site, path, kept, held.shape[axis])


def _check(model: nn.Module, found: Mapping[str, Site], plan: Plan, weights: Weights) -> None:
    """Refuse a plan, or weights, that don't fit the sites of a model."""
    model_type = type_of(model)
    if plan.model_type != model_type:
        raise InputError(
            f"apply_plan: the plan is for {plan.model_type!r}, the model is {model_type!r}; "
            "make a plan from this model"
        )
    # Experts are numbered as they are once the others are gone.
    gone = {
        f"{team}.{at}"
        for team, experts in plan.experts.items()
        for at in range(len(experts.kept), experts.units)
    }
    unknown = [name for name in plan.sites if name not in found or name in gone]
    unknown += [name for name in plan.experts if f"{name}.0" not in found]
    if unknown:
        raise InputError(
            f"apply_plan: the model has no site {', '.join(unknown[:4])}; make a plan from this "
            "model"
        )
    for name, experts in plan.experts.items():
        site = found[f"{name}.0"]
        check_count(name, site.experts, "experts", experts)
        if len(experts.kept) < (top_k := router_of(model, site).top_k):
            raise InputError(
                f"apply_plan: {name} sends every token to {top_k} experts, the plan keeps "
                f"{len(experts.kept)}; keep at least {top_k}"
            )
    for team, every in teams_of(list(found.values())).items():
        left = [site for site in every if site.name not in gone]
        kept = {
            len(plan.sites[site.name].kept) if site.name in plan.sites else site.units
            for site in left
        }
        if len(kept) > 1:
            raise InputError(
                f"apply_plan: {team} must keep equally many channels of each of its {len(left)} "
                f"experts, got {', '.join(map(str, sorted(kept)))}; name all of them in the plan"
            )
    for name, site_plan in plan.sites.items():
        _check_site(model, found[name], site_plan, plan.hidden, *weights.get(name, (None, None)))
    if stray := [name for name in weights if name not in plan.sites]:
        raise InputError(f"apply_plan: a weight came for {stray[0]}, which the plan doesn't name")


def _check_site(
    model: nn.Module,
    site: Site,
    plan: SitePlan,
    hidden: SitePlan | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_count(site.name, site.units, f"units ({site.unit})", plan)
    per_group = Counter(unit * site.groups // site.units for unit in plan.kept)
    kept = [per_group[group] for group in range(site.groups)]
    if len(set(kept)) != 1:
        raise InputError(
            f"apply_plan: {site.name} must keep equally many heads in each of its {site.groups} "
            f"KV groups, got {kept}; or prune whole groups with attn_unit='kv_group'"
        )
    d_out = site.d_out if hidden is None else len(hidden.kept)
    if weight is not None:
        _check_shape(f"weight of {site.name}", weight, (d_out, len(plan.kept) * site.width))
    if bias is not None:
        _check_shape(f"bias of {site.name}", bias, (d_out,))
    fixed = site.expert is not None or site.shared  # no module of its own has a place for one
    if (plan.bias and fixed) or (bias is not None and not plan.bias):
        if get_consumer_bias(model, site) is None:
            raise InputError(
                f"apply_plan: the consumer of {site.name} has no bias; set bias=True in its plan, "
                "or, of an expert and the like, which can't gain one, give none"
            )


def _hidden_layers(model: nn.Module, plan: Plan, weights: Weights) -> Weights:
    """Return the weights of norms and readers among ``weights``; refuse what doesn't fit."""
    if plan.hidden is None:
        return {}
    hidden, count = hidden_of(model), len(plan.hidden.kept)
    check_count("the model", hidden.size, "hidden features", plan.hidden)
    layers = {name: weights[name] for name in hidden.solved if name in weights}
    for name, (weight, _) in layers.items():
        shape = (*weight_of(model.get_submodule(name)).shape[:-1], count)
        _check_shape(f"weight of {name}", weight, shape)
    return layers


def _check_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"apply_plan: the {what} must have shape {shape}, got {tuple(tensor.shape)}"
        )


def _grow_biases(
    model: nn.Module, found: Mapping[str, Site], plan: Plan, flags: Collection[str]
) -> None:
    """Give zero biases to the consumers that the plan says, and to what shares their flag."""
    for name, site in found.items():
        paths = [site.consumer] if name in plan.sites and plan.sites[name].bias else []
        if site.wiring.bias_flag in flags:
            paths = [f"{site.path}.{layer}" for layer in site.wiring.layers]
        for layer in map(model.get_submodule, paths):
            if layer.bias is None:
                zeros = layer.weight.new_zeros(layer.weight.shape[int(site.wiring.transposed)])
                layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)


def _slice_team(model: nn.Module, team: Sequence[Site], plan: Plan) -> None:
    """Slice a site, or the experts of a layer, each to the units that the plan keeps of it."""
    site = team[0]
    kept = [plan.sites[each.name].kept for each in team if each.name in plan.sites]
    if not kept or len(kept[0]) == site.units:
        return
    found = [unit_slices(model, each, units) for each, units in zip(team, kept, strict=True)]
    for slices in zip(*found, strict=True):
        path, dim, index = slices[0]
        if site.expert is not None:
            index = torch.stack([own for _, _, own in slices])
        narrow(*owner_of(model, path), dim, index)
    if site.name.rpartition(".")[2] == CROSS:
        _follow_alignment(model, site, kept[0])
    if site.wiring.head_input is not None:
        said = site.wiring.head_input
        heads = site.features(kept[0])[:: site.head_dim] // site.head_dim
        module = model.get_submodule(f"{site.path}.{said.module}")
        passed = () if said.output is None else (said.output, said.table)
        which = None if said.own else heads.tolist()
        select_heads(module, which, said.position, said.keyword, *passed)


def _follow_alignment(model: nn.Module, site: Site, kept: Sequence[int]) -> None:
    """Renumber the heads of cross-attention that align words with times, as Whisper names them."""
    how, new = getattr(model, "generation_config", None), {head: at for at, head in enumerate(kept)}
    found = [
        [block, new[head] if block == site.block else head]
        for block, head in getattr(how, "alignment_heads", None) or ()
        if block != site.block or head in new
    ]
    if found:
        how.alignment_heads = found
    elif hasattr(how, "alignment_heads"):
        del how.alignment_heads


def _set_consumer(model: nn.Module, site: Site, weight: Tensor, bias: Tensor | None) -> None:
    consumer = layer_of(model, site)
    if site.shared:
        for layer, new in consumer.filled(weight):
            layer.weight.copy_(new)
        return
    consumer.weight.copy_(weight.T if site.wiring.transposed else weight)
    if bias is not None:
        consumer.bias.copy_(bias)


def _patch_numbers(model: nn.Module, site: Site) -> None:
    """Write the sizes of a sliced site into the integers that the block's modules keep."""
    block = model.get_submodule(site.path)
    for path, size in site.wiring.numbers.items():
        owner, dot, name = path.partition(".config.")
        if not dot:
            setattr(*owner_of(block, path.removesuffix("?")), site.sizes[size])
        elif getattr((module := block.get_submodule(owner)).config, name) != site.sizes[size]:
            set_config_number(module, name, site.sizes[size])


def site_step(site: Site, budget: Budget) -> int:
    """Return the step between counts that a site may keep: tiles, and eights of experts."""
    if site.unit != "channel":
        return site.groups
    base = 1 if site.expert is None else math.gcd(site.units, GROUPED_STEP)
    return budget.step(site.units, base)


def allowed_counts(site: Site, budget: Budget) -> tuple[int, ...]:
    """Return the unit counts that a site may keep, ascending: its grid, and all of its units."""
    step = site_step(site, budget)
    return (*range(step, site.units, step), site.units)
