"""The integers that modules keep, and which sizes of a site they are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from torch import nn

from liar_ext.models.family import Family
from liar_ext.models.registry import FAMILIES
from liar_ext.models.running import blocks_of
from liar_ext.models.sites import Site, sites
from liar_ext.suggest.instance import Refused

WIDTH = 88


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """Have a row in the table while the context is open."""
    before = FAMILIES.get(family.name)
    FAMILIES[family.name] = family
    try:
        yield
    finally:
        if before is None:
            FAMILIES.pop(family.name, None)
        else:
            FAMILIES[family.name] = before


def code(family: Family) -> str:
    """Return Python code that registers a row."""
    words: set[str] = set()
    text = _write(family, words, "    ")
    return (
        "from liar_ext import register_family\n"
        f"from liar_ext.models.family import {', '.join(sorted(words))}\n\n"
        f"register_family(\n    {text}\n)\n"
    )


def _write(value: Any, words: set[str], indent: str | None, taken: int = 0) -> str:
    """Return a value as code; on one line if it fits, or always without an indent.

    The classes that it is made of are added to ``words``.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # double quotes; newlines are escaped
    if value is None or isinstance(value, int | float):
        return repr(value)
    brackets, items = "()", [("", each) for each in value] if type(value) in (tuple, list) else []
    if isinstance(value, Mapping):
        brackets, items = "{}", [(f"{json.dumps(key)}: ", each) for key, each in value.items()]
    head = ""
    if is_dataclass(value) or hasattr(value, "_fields"):
        head, items = type(value).__name__, _set_fields(value)
        words.add(head)
    line = ", ".join(label + _write(each, words, None) for label, each in items)
    line += "," * (type(value) in (tuple, list) and len(items) == 1)
    line = head + brackets[0] + line + brackets[1]
    if indent is None or len(indent) + taken + len(line) < WIDTH:
        return line
    deeper = indent + "    "
    body = "".join(
        f"{deeper}{label}{_write(each, words, deeper, len(label))},\n" for label, each in items
    )
    return f"{head}{brackets[0]}\n{body}{indent}{brackets[1]}"


def _set_fields(value: Any) -> list[tuple[str, Any]]:
    """Return label and value of the fields that aren't as they are by default."""
    if is_dataclass(value):
        defaults = {
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in fields(value)
        }
        labels = {name: f"{name}=" for name in defaults}
    else:
        defaults = value._field_defaults
        labels = {name: f"{name}=" if name in defaults else "" for name in value._fields}
    return [
        (label, getattr(value, name))
        for name, label in labels.items()
        if defaults.get(name, MISSING) != getattr(value, name)
    ]


BLOCK = 1  # the one whose numbers are read: neither the first nor, mostly, the last
KINDS = ("attn", "mlp")
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
    fitting = [path for path in equal if _fits(family, path, models)]
    named = [path for path in fitting if HEAD.fullmatch(path.rpartition(".")[2])]
    chosen = named or fitting
    if not chosen:
        raise Refused(f"no module of the block keeps the size of a head ({head_dim}) as a number")
    if len({numbers[path] for path in chosen}) > 1:
        raise Refused(
            f"any of {', '.join(chosen[:4])} may be the size of a head, {head_dim}; a config with "
            "sizes that differ from one another would tell"
        )
    return replace(family, attn=replace(family.attn, head_dim=chosen[0]))


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
        family = replace(family, **{kind: replace(getattr(family, kind), numbers=each)})
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
    return replace(family, attn=replace(family.attn, per_head=tuple(found)))


def _sites(family: Family, models: list[nn.Module]) -> dict[str, list[Site]]:
    """Return the sites of one block, by kind, of each of some models."""
    with registered(family):
        every = {
            kind: [sites(model, (kind,)) for model in models]
            for kind in KINDS
            if getattr(family, kind) is not None
        }
    return {
        kind: [found[min(BLOCK, len(found) - 1)] for found in each] for kind, each in every.items()
    }


def _integers(models: list[nn.Module], family: Family, ran: Collection[str]) -> Numbers:
    """Return the integers that all modules of a block keep, by path, in each of some models.

    Modules that didn't run are left out, and linear layers: their sizes are those of their weights.
    """
    found: list[dict[str, int]] = []
    for model in models:
        values = {}
        for path, module in _block(model, family).named_modules():
            weight = module._parameters.get("weight")
            if path not in ran or (weight is not None and weight.ndim == 2):
                continue
            for name, value in vars(module).items():
                if type(value) is int and name[0] != "_":
                    values[f"{path}.{name}" if path else name] = value
        found.append(values)
    everywhere = [path for path in found[0] if all(path in values for values in found)]
    return {path: tuple(values[path] for values in found) for path in everywhere}


def _fits(family: Family, path: str, models: list[nn.Module]) -> bool:
    """Tell whether all models have whole heads of the size that an integer says."""
    trial = replace(family, attn=replace(family.attn, head_dim=path))
    try:
        with registered(trial):
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


def _config_numbers(models: list[nn.Module], family: Family) -> Numbers:
    """Return the integers of the config that the module around each consumer keeps."""
    numbers: Numbers = {}
    for wiring in filter(None, (family.attn, family.mlp)):
        path = wiring.consumer
        while path := path.rpartition(".")[0]:
            owners = [_block(model, family).get_submodule(path) for model in models]
            configs = [getattr(owner, "config", None) for owner in owners]
            if None not in configs:
                fields = [config.to_dict() for config in configs]
                for name in fields[0]:
                    values = tuple(each.get(name) for each in fields)
                    if all(type(value) is int for value in values):
                        numbers[f"{path}.config.{name}"] = values
                break
    return numbers


def _block(model: nn.Module, family: Family) -> nn.Module:
    blocks = [block for _, block in blocks_of(model, family)]
    return blocks[min(BLOCK, len(blocks) - 1)]
