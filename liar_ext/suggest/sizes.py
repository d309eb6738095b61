"""Which integers of modules, and which fields of a config, are sizes of sites."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice, product
from typing import Any
from unittest import mock

import torch
from torch import nn

from liar_ext.checkpoint.stock_config import dense_config, equal_config, shapes_of
from liar_ext.models.family import Family, Part
from liar_ext.models.layers import has_path
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.registry import FAMILIES
from liar_ext.models.running import block_config, blocks_of
from liar_ext.models.sites import Site, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.suggest.instance import Instance, Refused, Tried, attempt, with_field

KINDS = {"attn": "heads", "mlp": "channels"}  # of sites, and their units
BLOCK = 1  # the one whose numbers are read: neither the first nor, mostly, the last
HEAD = re.compile(r"head_?(dim|size|width)|attention_head_size|\w*head_dim|d_head|dim_head")
# Fields that may hold None where the class derives the size from others.
DERIVED = {
    "head_dim": re.compile(r"(\w+_)?head_(dim|size)"),
    "kv_heads": re.compile(r"\w*(kv|key_value)_heads"),
    "features": re.compile(r"\w*(inner|ffn|intermediate)\w*"),
}
CONFIG = ".config."  # in the path of a number of the config that a module has
MOST_CHOICES, MOST_TRIALS = 4096, 64  # of what integers may mean
Numbers = dict[str, tuple[int, ...]]
Meanings = dict[str, list[tuple[str, str]]]  # of an integer: kinds of site, and sizes of them


def registered(family: Family) -> AbstractContextManager:
    """Have a row in the table while the context is open."""
    return mock.patch.dict(FAMILIES, {family.name: family})


def rewired(family: Family, kind: str, **changes: Any) -> Family:
    """Return a row whose wirings of a kind, in all its parts, have some fields changed."""
    names = ("attn", "cross_attn") if kind == "attn" else (kind,)

    def change(row: Part) -> Part:
        there = {name: wiring for name in names if (wiring := getattr(row, name)) is not None}
        return replace(row, **{name: replace(each, **changes) for name, each in there.items()})

    return replace(change(family), parts=tuple(map(change, family.parts)))


def kinds_of(family: Family) -> list[str]:
    """Return the kinds of sites that a row describes."""
    return [kind for kind in KINDS if family.wirings(kind)]


def tells_sizes(family: Family, kind: str) -> bool:
    """Tell whether config fields express how many units the sites of a kind have."""
    found = family.wirings(kind)
    return bool(found) and all(wiring.config for wiring in found)


def less(family: Family, kind: str, why: str) -> Family:
    """Return a row without a kind of site, and why."""
    return replace(family, **{kind: None}, without={**family.without, kind: why})


def fitting_every_block(tried: Tried, family: Family) -> Family:
    """Return a row without what some block lacks, also of the whole model."""
    blocks = [*blocks_of(tried.models[0], family)]
    blocks += [] if tried.whole is None else blocks_of(tried.whole, family)
    for kind in KINDS:
        wiring = getattr(family, kind)
        for (path, block), layer in product(blocks, wiring.layers if wiring else ()):
            if not has_path(block, layer, nn.Module):
                family = less(family, kind, f"blocks differ: {path} has no {layer}")
                break
    return family


def some_plan(model: nn.Module, kinds: Sequence[str], unit: str = "", equal: bool = False) -> Plan:
    """Keep about half of the units at random; one more in every other block, unless equal.

    Without a unit of attention it is that of which there are several: heads, where all share a key.
    """
    if not unit:
        attn = attempt(lambda: sites(model, ("attn",)))  # None if it can't be pruned
        unit = "head" if attn and attn[0].units == 1 else "auto"
    generator = torch.Generator().manual_seed(3)
    kept = {}
    for site in sites(model, kinds, unit):
        run = site.units // site.groups
        count = min(run, max(1, run // 2) + (0 if equal else site.block % 2))
        chosen = [
            group * run + index
            for group in range(site.groups)
            for index in torch.randperm(run, generator=generator)[:count].sort().values.tolist()
        ]
        kept[site.name] = SitePlan(site.units, tuple(chosen))
    return Plan(model.config.model_type, unit, kept)


def with_head_dim(
    family: Family, models: list[nn.Module], head_dim: int, ran: Collection[str]
) -> Family:
    """Return a row that says where the size of a head is kept."""
    numbers = _integers(models, family, ran)
    rows = {
        path: rewired(family, "attn", head_dim=path)
        for path, values in numbers.items()
        if values[0] == head_dim
    }
    fitting = [path for path, row in rows.items() if _fits(row, models)]
    chosen = [path for path in fitting if HEAD.fullmatch(path.rpartition(".")[2])] or fitting
    if not chosen:
        raise Refused(f"no module of the block keeps the size of a head ({head_dim}) as a number")
    if len({numbers[path] for path in chosen}) > 1:
        raise Refused(
            f"any of {', '.join(chosen[:4])} may be the size of a head, {head_dim}; a config with "
            "sizes that differ from one another would tell"
        )
    return rows[chosen[0]]


def _fits(family: Family, models: list[nn.Module]) -> bool:
    """Tell whether all models have whole heads of the size that a row finds."""
    found = attempt(lambda: [site for each in models for site in _sites(each, family, "attn")])
    return found is not None and all(
        site.head_dim > 0 and site.d_in % site.head_dim == 0 and site.kv_heads > 0 for site in found
    )


def with_numbers(
    family: Family, models: list[nn.Module], ran: Collection[str]
) -> tuple[Family, Meanings]:
    """Return a row with the integers that follow, and what others may mean.

    An integer follows where it equals a size in two models whose sizes differ. The proof decides on
    those that equal the hidden size as well or were seen in one model alone, and on numbers of the
    config that modules have at hand, which a forward may read.
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
    for path, values in _config_numbers(models, family).items():
        if len(set(values)) > 1 and (fitting := _meanings(values, found)):
            unclear[path] = fitting
    return family, unclear


def _meanings(values: tuple[int, ...], found: dict[str, list[Site]]) -> list[tuple[str, str]]:
    """Return kind and name of the sizes that an integer equals in all models."""
    fitting = [
        (kind, name)
        for kind, each in found.items()
        for name in each[0].sizes
        if name != "head_dim" and tuple(site.sizes[name] for site in each) == values
    ]
    if ("attn", "heads") in fitting:  # as many in all models, where none or all heads share a key
        fitting = [each for each in fitting if each[1] not in ("kv_heads", "group_size")]
    return [] if values[0] == 0 or set(values) == {1} else fitting


def trials_of(family: Family, unclear: Meanings) -> Iterator[Family]:
    """Yield rows in which unclear integers mean nothing, then one thing or another.

    Numbers of the config come last: mostly no forward reads them.
    """
    kinds = kinds_of(family)
    options = [
        [None, *((path, kind, size) for kind, size in meanings if kind in kinds)]
        for path, meanings in unclear.items()
    ]
    choices = [list(filter(None, each)) for each in islice(product(*options), MOST_CHOICES)]
    choices.sort(key=lambda meant: (sum(CONFIG in path for path, _, _ in meant), len(meant)))
    for meant in choices[:MOST_TRIALS]:
        row = family
        for path, kind, size in meant:
            row = rewired(row, kind, numbers={**getattr(row, kind).numbers, path: size})
        yield row


def with_per_head(family: Family, models: list[nn.Module]) -> Family:
    """Return a row with the vectors that have one number per query head, in all models."""
    if family.attn is None or len(models) < 2:
        return family
    heads = [(site.sizes["heads"],) for site in _one_block(models, family)["attn"]]
    blocks = [_block(model, family).named_parameters() for model in models]
    shapes = [{name: tuple(each.shape) for name, each in block} for block in blocks]
    own = {f"{layer}.bias" for layer in family.attn.layers}
    found = [n for n in shapes[0] if n not in own and [each.get(n) for each in shapes] == heads]
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
                numbers |= {f"{path}{CONFIG}{name}": values for name, values in found.items()}
                break
    return numbers


def with_config(instances: list[Instance], family: Family) -> Family:
    """Return a row with the config fields that express equal layers, or why there are none.

    A field holds the size in the config of every instance, and the stock class that is built with
    it has the shapes of a model that was sliced. Of several parts these are the fields that all of
    them follow together, looked for where some part has none.
    """
    model, reasons = instances[0].model, []
    if not family.parts:
        whole, text = model.config, model.config.get_text_config()
        part = next((n for n in whole.sub_configs if getattr(whole, n, None) is text), "")
        family = replace(family, config=part)
    for kind in kinds_of(family):
        if tells_sizes(family, kind):
            continue
        choices = _choices(instances, family, kind)
        trials = (rewired(family, kind, config=fields) for fields in choices)
        family = next((trial for trial in trials if _expresses(model, trial, kind)), family)
        if not tells_sizes(family, kind):
            reasons.append(f"no config field builds fewer {KINDS[kind]} in the blocks alone")
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
        changed = shapes_of(model).keys() ^ shapes_of(built).keys() if built else set()
        given = [kind for kind, each in biases.items() if each <= changed]
        if given and changed == set().union(*(biases[kind] for kind in given)):
            for kind in given:
                family = rewired(family, kind, bias_flag=name)
    return family


def _choices(instances: list[Instance], family: Family, kind: str) -> Iterator[dict[str, str]]:
    """Yield fields that hold the sizes of a site in the config of every instance."""
    sizes = [_sites(each.model, family, kind)[0].sizes for each in instances]
    configs = [block_config(family, each.model.config).to_dict() for each in instances]

    def names(size: str) -> list[str]:
        return [
            name
            for name, value in configs[0].items()
            if (value is None and size in DERIVED and DERIVED[size].fullmatch(name))
            or (type(value) is int and [c.get(name) for c in configs] == [s[size] for s in sizes])
        ]

    if kind == "mlp":
        yield from ({name: "features"} for name in names("features"))
        return
    shared = names("kv_heads") if sizes[0]["kv_heads"] != sizes[0]["heads"] else []
    # Classes may read a size of heads that their config doesn't list.
    dims = [*names("head_dim"), "head_dim", ""]
    for chosen in product(names("heads"), [*shared, ""], dims):
        both = zip(chosen, ("heads", "kv_heads", "head_dim"), strict=True)
        yield {name: size for name, size in both if name}


def _expresses(model: nn.Module, family: Family, kind: str) -> bool:
    """Tell whether the stock class, built by the fields of a row, has the sliced shapes."""
    model = copy.deepcopy(model)
    with registered(family):
        apply_plan(model, some_plan(model, (kind,), equal=True))
        return attempt(lambda: equal_config(model, dense_config(model.config))) is not None
