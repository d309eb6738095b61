"""Which integers of modules, and which fields of a config, are sizes of sites."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from liar_ext.checkpoint.stock_config import dense_config, equal_config, shapes_of
from liar_ext.models.family import Family
from liar_ext.models.running import block_config, blocks_of
from liar_ext.models.sites import Site, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.suggest.instance import Instance, Refused, attempt, with_field
from liar_ext.suggest.proof import KINDS, kinds_of, registered, rewired, some_plan, tells_sizes

BLOCK = 1  # the one whose numbers are read: neither the first nor, mostly, the last
HEAD = re.compile(r"head_?(dim|size|width)|attention_head_size|\w*head_dim|d_head|dim_head")
Numbers = dict[str, tuple[int, ...]]
Meanings = dict[str, list[tuple[str, str]]]  # of an integer: kinds of site, and sizes of them
# Fields that may hold None where the class derives the size from others.
DERIVED = {
    "head_dim": re.compile(r"(\w+_)?head_(dim|size)"),
    "kv_heads": re.compile(r"\w*(kv|key_value)_heads"),
    "features": re.compile(r"\w*(inner|ffn|intermediate)\w*"),
}
OTHER = {"heads": 2, "kv_heads": 1, "head_dim": 24, "features": 36}


def with_head_dim(
    family: Family, models: list[nn.Module], head_dim: int, ran: Collection[str]
) -> Family:
    """Return a row that says where the size of a head is kept."""
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

    An integer follows where it equals a size in two models whose sizes differ. The proof decides on
    those second, which equal the hidden size as well or were seen in one model alone, and those
    third: numbers of the config that modules have at hand, which a forward may read.
    """
    found = _one_block(models, family)
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
    heads = tuple(site.sizes["heads"] for site in _one_block(models, family)["attn"])
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


def _sites(model: nn.Module, family: Family, kind: str) -> list[Site]:
    with registered(family):
        return sites(model, (kind,))


def _one_block(models: list[nn.Module], family: Family) -> dict[str, list[Site]]:
    """Return the sites of one block, by kind, of each of some models."""
    every = {kind: [_sites(model, family, kind) for model in models] for kind in kinds_of(family)}
    return {kind: [at[min(BLOCK, len(at) - 1)] for at in each] for kind, each in every.items()}


def _block(model: nn.Module, family: Family) -> nn.Module:
    blocks = [block for _, block in blocks_of(model, family)]
    return blocks[min(BLOCK, len(blocks) - 1)]


def _integers(models: list[nn.Module], family: Family, ran: Collection[str]) -> Numbers:
    """Return the integers that all modules of a block keep, by path, in each of some models.

    Modules that didn't run are left out, and linear layers: their sizes are those of their weights.
    """

    def keeps(path: str, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return path in ran and (weight is None or weight.ndim != 2)

    blocks = (_block(model, family).named_modules() for model in models)
    return _in_all(
        {
            f"{path}.{name}".removeprefix("."): value
            for path, module in block
            if keeps(path, module)
            for name, value in vars(module).items()
            if name[0] != "_"
        }
        for block in blocks
    )


def _in_all(found: Iterable[Mapping[str, Any]]) -> Numbers:
    """Return the integers that all have, each with its values."""
    first, *others = found
    values = {path: (first[path], *(each.get(path) for each in others)) for path in first}
    return {path: each for path, each in values.items() if {*map(type, each)} == {int}}


def _config_numbers(models: list[nn.Module], family: Family) -> Numbers:
    """Return the integers of the config that the module around each consumer keeps."""
    numbers: Numbers = {}
    for wiring in filter(None, (family.attn, family.mlp)):
        path = wiring.consumer
        while path := path.rpartition(".")[0]:
            owners = [_block(model, family).get_submodule(path) for model in models]
            configs = [getattr(owner, "config", None) for owner in owners]
            if None not in configs:
                found = _in_all(config.to_dict() for config in configs)
                numbers |= {f"{path}.config.{name}": values for name, values in found.items()}
                break
    return numbers


def _fits(family: Family, models: list[nn.Module]) -> bool:
    """Tell whether all models have whole heads of the size that a row finds."""
    found = attempt(lambda: [site for each in models for site in _sites(each, family, "attn")])
    return found is not None and all(
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


def with_config(instances: list[Instance], family: Family) -> Family:
    """Return a row with the config fields that express equal layers, or why there are none.

    A field holds the size in the config of every instance, and the stock class that is built with
    it has the shapes of a model that was sliced. Of several parts these are the fields that all of
    them follow together, looked for where some part has none.
    """
    model, reasons = instances[0].model, []
    if not family.parts:
        family = replace(family, config=_part_of(model, family))
    for kind in kinds_of(family):
        if tells_sizes(family, kind):
            continue
        fields, others = _fields_of(instances, family, kind)
        trials = (rewired(family, kind, config=chosen) for chosen in _choices(fields))
        family = next((trial for trial in trials if _expresses(model, trial, kind)), family)
        if tells_sizes(family, kind):
            continue
        why = f"{', '.join(others)} changes other layers as well" if others else ""
        why = f"{' and '.join(fields)} can't build fewer of the same size" if fields else why
        alone = f"no config field builds fewer {KINDS[kind]} in the blocks alone"
        reasons.append(f"{KINDS[kind]}: {why}" if why else alone)
    stock = {"stock": "; ".join(reasons)} if reasons else {}
    return replace(family, without={**family.without, **stock})


def with_bias_flags(instance: Instance, family: Family) -> Family:
    """Return a row with the config fields that give a bias to all layers of a site."""
    model, biases = instance.model, {}
    for kind in kinds_of(family):
        at = _sites(model, family, kind)
        biases[kind] = {f"{site.path}.{layer}.bias" for site in at for layer in site.wiring.layers}
    part_of = partial(block_config, family)
    own = part_of(model.config).to_dict()
    for name in (n for n, value in own.items() if "bias" in n and isinstance(value, bool)):
        built = attempt(partial(with_field, model, name, not own[name], part_of))
        if built is None:
            continue
        changed = shapes_of(model).keys() ^ shapes_of(built).keys()
        given = [kind for kind, each in biases.items() if each <= changed]
        if given and changed == set().union(*(biases[kind] for kind in given)):
            for kind in given:
                family = rewired(family, kind, bias_flag=name)
    return family


def _part_of(model: nn.Module, family: Family) -> str:
    """Return the name of the part of a config that the blocks are built from; empty for all."""
    config = model.config
    path = next(blocks_of(model, family))[0]
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    while path := path.rpartition(".")[0]:
        used = getattr(model.get_submodule(path), "config", None)
        if used is config:
            return ""
        for name, part in parts.items():
            if part is not None and (part is used or type(part) is type(used)):
                return name
    return ""


def _choices(fields: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the fields to try: all; then with a size of heads that no field had; then without."""
    if fields:
        yield dict(fields)
        fewer = {name: size for name, size in fields.items() if size != "head_dim"}
        if "heads" in fewer.values():  # classes may read a field that their config doesn't list
            yield {**fewer, "head_dim": "head_dim"}
        if fewer and fewer != fields:
            yield fewer


def _fields_of(
    instances: list[Instance], family: Family, kind: str
) -> tuple[dict[str, str], list[str]]:
    """Return the fields that hold a size of a site: those of that site alone, and others."""
    model = instances[0].model
    at = _sites(model, family, kind)
    sizes = [_sites(each.model, family, kind)[0].sizes for each in instances]
    blocks = tuple(f"{site.path}." for site in at)
    own = tuple(f"{site.path}.{layer}." for site in at for layer in site.wiring.layers)
    own += tuple(f"{site.path}.{name}" for site in at for name in site.wiring.per_head)
    part_of = partial(block_config, family)
    configs = [part_of(each.model.config).to_dict() for each in instances]
    before = shapes_of(model)
    found: dict[str, str] = {}
    others: list[str] = []
    for size in ("heads", "kv_heads", "head_dim") if kind == "attn" else ("features",):
        if not sizes[0][size] or size == "kv_heads" and sizes[0]["kv_heads"] == sizes[0]["heads"]:
            continue
        for name, value in configs[0].items():
            derived = value is None and size in DERIVED and DERIVED[size].fullmatch(name)
            holds = all(
                type(config.get(name)) is int and config[name] == each[size]
                for config, each in zip(configs, sizes, strict=True)
            )
            if name in found or not (derived or holds):
                continue
            built = attempt(partial(with_field, model, name, OTHER[size], part_of))
            if built is None:  # a rule ties it to another field
                found |= {name: size} if holds and size in ("heads", "kv_heads") else {}
                continue
            after = shapes_of(built)
            changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
            # Norms of single heads follow the size of a head.
            places = blocks if size == "head_dim" else own
            # A number of heads that divides the hidden size changes no shape.
            at_built = attempt(partial(_sites, built, family, kind))
            follows = bool(at_built) and at_built[0].sizes[size] == OTHER[size]
            if follows and all(n.startswith(places) for n in changed):
                found[name] = size
            elif size == "features" and any(n.startswith(own) for n in changed):
                others.append(name)
    return found, others


def _expresses(model: nn.Module, family: Family, kind: str) -> bool:
    """Tell whether the stock class, built by the fields of a row, has the sliced shapes."""
    model = copy.deepcopy(model)
    with registered(family):
        apply_plan(model, some_plan(model, (kind,), equal=True))
        return attempt(lambda: equal_config(model, dense_config(model.config))) is not None
