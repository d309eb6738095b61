"""Which fields of a config express the sizes of sites, found by building it with other values."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from liar_ext.checkpoint.stock_config import dense_config, equal_config
from liar_ext.models.family import Family
from liar_ext.models.running import block_config, blocks_of
from liar_ext.models.sites import sites
from liar_ext.models.slicing import apply_plan
from liar_ext.suggest.instance import Instance, build
from liar_ext.suggest.proof import some_plan
from liar_ext.suggest.rows import KINDS, kinds_of, registered, rewired, tells_sizes

# Fields that may hold None where the class derives the size from others.
DERIVED = {
    "head_dim": re.compile(r"(\w+_)?head_(dim|size)"),
    "kv_heads": re.compile(r"\w*(kv|key_value)_heads"),
    "features": re.compile(r"\w*(inner|ffn|intermediate)\w*"),
}
OTHER = {"heads": 2, "kv_heads": 1, "head_dim": 24, "features": 36}


def with_config(instances: list[Instance], family: Family) -> tuple[Family, dict[str, str]]:
    """Return a row with the config fields that express equal layers, and why there are none.

    The proof of a field is that the stock class, built with it, has the shapes of a model that was
    sliced. It holds the size in the config of every instance. Of a row of several parts these are
    the fields that all of them follow together, and are looked for where some part has none.
    """
    model, reasons = instances[0].model, {}
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
        reasons[kind] = f"no config field builds fewer {KINDS[kind]} in the blocks alone"
        if fields:
            said = f"{' and '.join(fields)} can't build fewer of the same size"
            reasons[kind] = f"{KINDS[kind]}: {said}"
        elif others:
            said = f"{', '.join(others)} changes other layers as well"
            reasons[kind] = f"{KINDS[kind]}: {said}"
    return family, reasons


def with_bias_flags(instance: Instance, family: Family) -> Family:
    """Return a row with the config fields that give a bias to all layers of a site."""
    model, biases = instance.model, {}
    with registered(family):
        for kind in kinds_of(family):
            at = sites(model, (kind,))
            layers = {f"{site.path}.{layer}" for site in at for layer in site.wiring.layers}
            biases[kind] = {f"{layer}.bias" for layer in layers}
    own = block_config(family, model.config).to_dict()
    for name in (n for n, value in own.items() if "bias" in n and isinstance(value, bool)):
        built = _build(model, family, name, not own[name])
        if built is None:
            continue
        changed = _shapes(model).keys() ^ _shapes(built).keys()
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
    with registered(family):
        sizes = [sites(each.model, (kind,))[0].sizes for each in instances]
        at = sites(model, (kind,))
    blocks = tuple(f"{site.path}." for site in at)
    own = tuple(f"{site.path}.{layer}." for site in at for layer in site.wiring.layers)
    own += tuple(f"{site.path}.{name}" for site in at for name in site.wiring.per_head)
    configs = [block_config(family, each.model.config).to_dict() for each in instances]
    before = _shapes(build(type(model), model.config, "meta"))
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
            built = _build(model, family, name, OTHER[size])
            if built is None:  # a rule ties it to another field
                found |= {name: size} if holds and size in ("heads", "kv_heads") else {}
                continue
            after = _shapes(built)
            changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
            # Norms of single heads follow the size of a head.
            places = blocks if size == "head_dim" else own
            if _follows(built, family, kind, size) and all(n.startswith(places) for n in changed):
                found[name] = size
            elif size == "features" and any(n.startswith(own) for n in changed):
                others.append(name)
    return found, others


def _follows(built: nn.Module, family: Family, kind: str, size: str) -> bool:
    """Tell whether the size of a site is the one that a field was set to.

    Where a head is the hidden size by the number of heads, the number follows and no shape does.
    """
    with registered(family):
        try:
            return sites(built, (kind,))[0].sizes[size] == OTHER[size]
        except (ValueError, ZeroDivisionError):
            return False


def _expresses(model: nn.Module, family: Family, kind: str) -> bool:
    """Tell whether the stock class, built by the fields of a row, has the sliced shapes."""
    model = copy.deepcopy(model)
    with registered(family):
        apply_plan(model, some_plan(model, (kind,), equal=True))
        try:
            return equal_config(model, dense_config(model.config)) is not None
        except Exception:  # a stranger's class and config have rules of their own
            return False


def _build(model: nn.Module, family: Family, field: str, value: Any) -> nn.Module | None:
    """Return a model of the config with a field changed; None if its rules forbid it."""
    config = copy.deepcopy(model.config)
    try:
        setattr(block_config(family, config), field, value)
        return build(type(model), config, "meta")
    except Exception:  # a stranger's class and config have rules of their own
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in model.named_parameters()}
