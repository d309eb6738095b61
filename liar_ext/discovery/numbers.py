"""The integers that modules keep, and which sizes of a site they are."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from liar_ext.discovery.instance import Refused
from liar_ext.discovery.rows import registered
from liar_ext.models.family import Family
from liar_ext.models.reading import blocks_of
from liar_ext.models.sites import Site, sites

BLOCK = 1  # the one whose numbers are read: neither the first nor, mostly, the last
HEAD = re.compile(r"head_?(dim|size|width)|attention_head_size|\w*head_dim|d_head|dim_head")
Numbers = dict[str, tuple[int, ...]]


def integers(models: list[nn.Module], family: Family, ran: Collection[str]) -> Numbers:
    """Return the integers that all modules of a block keep, by path, in each of some models.

    Modules that didn't run are left out, and linear layers: their sizes are those of their weights.
    """
    found: list[dict[str, int]] = []
    for model in models:
        found_blocks = list(blocks_of(model, family))
        _, block = found_blocks[min(BLOCK, len(found_blocks) - 1)]
        values = {}
        for path, module in block.named_modules():
            weight = module._parameters.get("weight")
            if path not in ran:
                continue
            if weight is not None and weight.ndim == 2:
                continue
            for name, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool) and name[0] != "_":
                    values[f"{path}.{name}" if path else name] = value
        found.append(values)
    everywhere = [path for path in found[0] if all(path in values for values in found)]
    return {path: tuple(values[path] for values in found) for path in everywhere}


def with_head_dim(
    family: Family, models: list[nn.Module], head_dim: int, ran: Collection[str]
) -> Family:
    """Return a row that says where the size of a head is kept.

    Raises
    ------
    Refused
        If no integer of the block has it, or several do that differ elsewhere.
    """
    numbers = integers(models, family, ran)
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


def with_numbers(
    family: Family, models: list[nn.Module], ran: Collection[str]
) -> tuple[Family, dict[str, list[str]]]:
    """Return a row with the integers that follow, and those of which it isn't known.

    An integer follows where it equals a size in two models whose sizes differ. One that equals the
    hidden size as well, or that was seen in one model alone, is left to the proof: it has a list of
    the sizes that it may be.
    """
    numbers = integers(models, family, ran)
    with registered(family):
        found = {
            kind: [_of_block(sites(model, (kind,))) for model in models]
            for kind in ("attn", "mlp")
            if getattr(family, kind) is not None
        }
    hidden = tuple(next(iter(found.values()))[i].d_out for i in range(len(models)))
    unclear: dict[str, list[str]] = {}
    chosen: dict[str, dict[str, str]] = {kind: {} for kind in found}
    for path, values in numbers.items():
        fitting = {
            (kind, name): None
            for kind, each in found.items()
            for name in each[0].sizes
            if name != "head_dim" and tuple(site.sizes[name] for site in each) == values
        }
        if ("attn", "heads") in fitting:
            fitting.pop(("attn", "kv_heads"), None)  # no group in any model
        if not fitting or values[0] == 1 and len(set(values)) == 1:
            continue
        kind, name = next(iter(fitting))
        certain = len(fitting) == 1 and len(set(values)) > 1 and values != hidden
        if certain:
            chosen[kind][path] = name
        else:
            unclear[path] = [f"{kind}:{name}" for kind, name in fitting]
    for kind, each in chosen.items():
        family = replace(family, **{kind: replace(getattr(family, kind), numbers=each)})
    return family, unclear


def _of_block(found: list[Site]) -> Site:
    return found[min(BLOCK, len(found) - 1)]
