"""Try a row on tiny instances: sliced equals zeroed, in every combination, and it loads."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.loading import load_pruned
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import is_stock
from liar_ext.models.family import Family, Part
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.registry import FAMILIES
from liar_ext.models.sites import get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.suggest.instance import Instance, Refused, attempt, make_plain, outputs
from liar_ext.system.errors import one_line
from liar_ext.system.progress import quiet

KINDS = {"attn": "heads", "mlp": "channels"}  # of sites, and their units
CLOSE = 1e-6  # of the largest output: norms compute in float32 whatever the model's dtype
NOTICED = 1e-4  # by which zeroing must change the outputs, so that the comparison can fail


def registered(family: Family) -> AbstractContextManager:
    """Have a row in the table while the context is open."""
    return mock.patch.dict(FAMILIES, {family.name: family})


def rewired(family: Family, kind: str, **changes: Any) -> Family:
    """Return a row whose wirings of a kind, in all its parts, have some fields changed."""
    names = ("attn", "cross_attn") if kind == "attn" else (kind,)

    def change(row: Part) -> Part:
        there = {name: wiring for name in names if (wiring := getattr(row, name)) is not None}
        return replace(row, **{name: replace(each, **changes) for name, each in there.items()})

    return (
        replace(family, parts=tuple(map(change, family.parts))) if family.parts else change(family)
    )


def kinds_of(family: Family) -> list[str]:
    """Return the kinds of sites that a row describes."""
    return [kind for kind in KINDS if family.wirings(kind)]


def tells_sizes(family: Family, kind: str) -> bool:
    """Tell whether config fields express how many units the sites of a kind have."""
    found = family.wirings(kind)
    return bool(found) and all(wiring.config for wiring in found)


def prove(instances: Sequence[Instance], family: Family) -> tuple[str]:
    """Return in words what was proved of a row, on each of some instances."""
    done: dict[str, float] = {}
    stock = type(instances[0].model)
    has_sdpa = stock._supports_sdpa and stock._can_set_attn_implementation()
    ways = ("eager", "sdpa") if has_sdpa else ("eager",)
    with registered(family):
        for instance, attention in product(instances, ways):
            for kinds, unit in _combinations(instance.model, kinds_of(family)):
                error = _compare(instance, kinds, unit, attention)
                name = " and ".join(kinds) + (f" by {unit}" if "attn" in kinds else "")
                done[name] = max(error, done.get(name, 0.0))
    worst = max(done.values())
    said = f"to {worst:.0e} of the largest output" if worst else "exactly"
    return (f"sliced equals zeroed {said}, in float64: {', '.join(done)}",)


def prove_folders(instance: Instance, family: Family) -> list[str]:
    """Return in words which saved folders give the same outputs when they are loaded."""
    said, stock = [], type(instance.model)
    kinds = [kind for kind in kinds_of(family) if tells_sizes(family, kind)]
    with registered(family), tempfile.TemporaryDirectory() as folder, quiet():
        if kinds:
            plan = some_plan(instance.model, kinds, equal=True)
            _check_folder(instance, plan, Path(folder) / "equal", stock.from_pretrained)
            by = f"{stock.__name__}.from_pretrained"
            said.append(f"equal layers of {' and '.join(kinds)} load in {by}")
        if is_stock(stock):
            plan = some_plan(instance.model, kinds_of(family))
            _check_folder(instance, plan, Path(folder) / "unequal", load_pruned)
            said.append("unequal layers load by liar_ext.load_pruned")
    return said


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


def _combinations(model: nn.Module, kinds: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield which kinds of site are pruned together, and by which unit of attention."""
    for subset in [[kind] for kind in kinds] + [kinds] * (len(kinds) > 1):
        units = ["auto"]
        if "attn" in subset:
            site = sites(model, ("attn",))[0]
            units = ["kv_group", "head"] if site.unit == "kv_group" else ["head"]
            units = [unit for unit in units if sites(model, ("attn",), unit)[0].units > 1]
        yield from ((subset, unit) for unit in units)


def _compare(instance: Instance, kinds: Sequence[str], unit: str, attention: str) -> float:
    """Return by how much a sliced model differs from the one with zeroed columns."""
    dense, sliced = (instance._replace(model=copy.deepcopy(instance.model)) for _ in range(2))
    what = f"with {' and '.join(kinds)} pruned" + f" by {unit}" * ("attn" in kinds)
    for each in (dense, sliced) if attention != "eager" else ():
        each.model.set_attn_implementation(attention)
    plan = some_plan(dense.model, kinds, unit)
    before = outputs(dense)
    for site in sites(dense.model, kinds, unit):
        removed = site.features(plan.sites[site.name].removed)
        get_consumer_weight(dense.model, site)[:, removed] = 0
    expected = outputs(dense)
    try:
        apply_plan(sliced.model, plan)
        given = outputs(sliced)
    except Exception as error:  # whatever a stranger's forward raises
        said = f"{type(error).__name__}: {one_line(error, 120)}"
        raise Refused(f"{what} the model fails: {said}") from error
    if _distance(before, expected) < NOTICED:
        raise Refused(f"{what}, zeroing changes no output, so that nothing can be compared")
    if given.shape != expected.shape:
        raise Refused(f"{what} the outputs have another size")
    error = _distance(given, expected)
    if not error <= CLOSE:
        raise Refused(f"{what} the outputs are {error:.1e} from those with zeroed columns")
    return error


def _distance(given: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a fraction of the largest value."""
    return float((given - expected).abs().max()) / float(expected.abs().max())


def _check_folder(instance: Instance, plan: Plan, folder: Path, load: Any) -> None:
    """Refuse a row if a pruned model that is saved doesn't load, or with other outputs."""
    pruned = instance._replace(model=copy.deepcopy(instance.model))
    apply_plan(pruned.model, plan)
    expected = outputs(pruned)
    try:
        save_pruned(pruned.model, folder, plan)
        loaded = load(folder, dtype=torch.float64)
        make_plain(loaded.config)
        # Buffers were made in float32, of this model as of the one that was saved.
        given = outputs(instance._replace(model=loaded.to(torch.float64).eval()))
    except Exception as error:  # a stranger's class and config have rules of their own
        raise Refused(f"a saved folder doesn't load: {one_line(error, 160)}") from error
    if given.shape != expected.shape or not _distance(given, expected) <= CLOSE:
        raise Refused("a saved folder loads with other outputs")
