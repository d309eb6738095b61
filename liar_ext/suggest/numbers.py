"""The integers that modules keep, and which sizes of a site they are."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from liar_ext.models.family import Family
from liar_ext.models.running import blocks_of
from liar_ext.models.sites import Site, sites
from liar_ext.suggest.instance import Refused
from liar_ext.suggest.rows import kinds_of, registered, rewired

BLOCK = 1  # the one whose numbers are read: neither the first nor, mostly, the last
HEAD = re.compile(r"head_?(dim|size|width)|attention_head_size|\w*head_dim|d_head|dim_head")
Numbers = dict[str, tuple[int, ...]]
Meanings = dict[str, list[tuple[str, str]]]  # of an integer: kinds of site, and sizes of them


def with_head_dim(
    family: Family, models: list[nn.Module], head_dim: int, ran: Collection[str]
) -> Family:
    """Return a row that says where the size of a head is kept.

    Raises
    ------
    Refused
        If no integer of the block has it, or several do that differ elsewhere.
    """
    numbers = _integers(models, family, ran)
    equal = [path for path, values in numbers.items() if values[0] == head_dim]
    fitting = [path for path in equal if _fits(rewired(family, "attn", head_dim=path), models)]
    named = [path for path in fitting if HEAD.fullmatch(path.rpartition(".")[2])]
    chosen = named or fitting
    if not chosen:
        raise Refused(f"no module of the block keeps the size of a head ({head_dim}) as a number")
    if len({numbers[path] for path in chosen}) > 1:
        raise Refused(
            f"any of {', '.join(chosen[:4])} may be the size of a head, {head_dim}; a config with "
            "sizes that differ from one another would tell"
        )
    return rewired(family, "attn", head_dim=chosen[0])


def with_numbers(
    family: Family, models: list[nn.Module], ran: Collection[str]
) -> tuple[Family, Meanings, Meanings]:
    """Return a row with the integers that follow, and what others may mean.

    An integer follows where it equals a size in two models whose sizes differ. One that equals the
    hidden size as well, or that was seen in one model alone, is left to the proof, with the sizes
    that it may be: the second that is returned. The third are numbers of the config that modules
    have at hand, which a forward may read.
    """
    found = _sites(family, models)
    hidden = tuple(site.d_out for site in next(iter(found.values())))
    unclear: Meanings = {}
    chosen: dict[str, dict[str, str]] = {kind: {} for kind in found}
    for path, values in _integers(models, family, ran).items():
        fitting = _meanings(values, found)
        if len(fitting) == 1 and len(set(values)) > 1 and values != hidden:
            kind, size = fitting[0]
            chosen[kind][path] = size
        elif fitting:
            unclear[path] = fitting
    for kind, each in chosen.items():
        family = rewired(family, kind, numbers=each)
    at_hand = {
        path: fitting
        for path, values in _config_numbers(models, family).items()
        if len(set(values)) > 1 and (fitting := _meanings(values, found))
    }
    return family, unclear, at_hand


def with_per_head(family: Family, models: list[nn.Module]) -> Family:
    """Return a row with the vectors that have one number per query head, in all models."""
    if family.attn is None or len(models) < 2:
        return family
    heads = tuple(site.sizes["heads"] for site in _sites(family, models)["attn"])
    blocks = [dict(_block(model, family).named_parameters()) for model in models]
    own = {f"{layer}.bias" for layer in family.attn.layers}
    found = [
        name
        for name in blocks[0]
        if name not in own
        and all(name in block and block[name].ndim == 1 for block in blocks)
        and tuple(len(block[name]) for block in blocks) == heads
    ]
    return rewired(family, "attn", per_head=tuple(found))


def _sites(family: Family, models: list[nn.Module]) -> dict[str, list[Site]]:
    """Return the sites of one block, by kind, of each of some models."""

    def one(model: nn.Module, kind: str) -> Site:
        found = sites(model, (kind,))
        return found[min(BLOCK, len(found) - 1)]

    with registered(family):
        return {kind: [one(model, kind) for model in models] for kind in kinds_of(family)}


def _block(model: nn.Module, family: Family) -> nn.Module:
    blocks = [block for _, block in blocks_of(model, family)]
    return blocks[min(BLOCK, len(blocks) - 1)]


def _integers(models: list[nn.Module], family: Family, ran: Collection[str]) -> Numbers:
    """Return the integers that all modules of a block keep, by path, in each of some models.

    Modules that didn't run are left out, and linear layers: their sizes are those of their weights.
    """
    found: list[dict[str, int]] = []
    for model in models:
        found.append({})
        for path, module in _block(model, family).named_modules():
            weight = module._parameters.get("weight")
            if path in ran and (weight is None or weight.ndim != 2):
                numbers = {n: v for n, v in vars(module).items() if type(v) is int and n[0] != "_"}
                found[-1] |= {f"{path}.{n}" if path else n: v for n, v in numbers.items()}
    return _in_all(found)


def _in_all(found: list[dict[str, int]]) -> Numbers:
    """Return the integers that all have, each with its values."""
    there = [path for path in found[0] if all(type(each.get(path)) is int for each in found)]
    return {path: tuple(each[path] for each in found) for path in there}


def _config_numbers(models: list[nn.Module], family: Family) -> Numbers:
    """Return the integers of the config that the module around each consumer keeps."""
    numbers: Numbers = {}
    for wiring in filter(None, (family.attn, family.mlp)):
        path = wiring.consumer
        while path := path.rpartition(".")[0]:
            owners = [_block(model, family).get_submodule(path) for model in models]
            configs = [getattr(owner, "config", None) for owner in owners]
            if None not in configs:
                found = _in_all([config.to_dict() for config in configs])
                numbers |= {f"{path}.config.{name}": values for name, values in found.items()}
                break
    return numbers


def _fits(family: Family, models: list[nn.Module]) -> bool:
    """Tell whether all models have whole heads of the size that a row finds."""
    try:
        with registered(family):
            found = [site for model in models for site in sites(model, ("attn",))]
    except (ValueError, ZeroDivisionError, RuntimeError):
        return False
    return all(
        site.head_dim > 0 and site.d_in % site.head_dim == 0 and site.kv_heads > 0 for site in found
    )


def _meanings(values: tuple[int, ...], found: dict[str, list[Site]]) -> list[tuple[str, str]]:
    """Return kind and name of the sizes that an integer equals in all models."""
    fitting = [
        (kind, name)
        for kind, each in found.items()
        for name in each[0].sizes
        if name != "head_dim"
        and each[0].sizes[name]
        and tuple(site.sizes[name] for site in each) == values
    ]
    if ("attn", "heads") in fitting:  # as many in all models, where none or all heads share a key
        fitting = [each for each in fitting if each[1] not in ("kv_heads", "group_size")]
    return [] if set(values) == {1} else fitting
