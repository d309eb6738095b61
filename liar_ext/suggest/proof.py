"""Prove a row on tiny instances: sliced equals zeroed, in every combination, and it loads."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liar_ext.checkpoint.loading import load_pruned
from liar_ext.checkpoint.quietening import quiet
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import in_transformers
from liar_ext.errors import InputError, one_line
from liar_ext.models.family import Family, Wiring
from liar_ext.models.sites import get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.plan import Plan, SitePlan
from liar_ext.suggest.instance import Instance, Refused, make_plain, outputs
from liar_ext.suggest.numbers import registered

CLOSE = 1e-6  # of the largest output: norms compute in float32 whatever the model's dtype
NOTICED = 1e-4  # by which zeroing must change the outputs, so that the comparison can fail


def prove(instances: Sequence[Instance], family: Family) -> list[str]:
    """Return in words what was proved of a row, on each of some instances.

    Raises
    ------
    Refused
        At the first combination in which a sliced model isn't the one with zeroed columns.
    """
    done: dict[str, float] = {}
    with registered(family):
        for instance, attention in product(instances, ("eager", "sdpa")):
            if attention == "sdpa" and not _has_sdpa(instance.model):
                continue
            for kinds, unit in _combinations(instance.model, family):
                error = _compare(instance, kinds, unit, attention)
                name = " and ".join(kinds) + (f" by {unit}" if "attn" in kinds else "")
                done[name] = max(error, done.get(name, 0.0))
    worst = max(done.values())
    said = f"to {worst:.0e} of the largest output" if worst else "exactly"
    return [f"sliced equals zeroed {said}, in float64: {', '.join(done)}"]


def prove_folders(instance: Instance, family: Family) -> list[str]:
    """Return in words which saved folders give the same outputs when they are loaded.

    Raises
    ------
    Refused
        If one doesn't.
    """
    said, model = [], instance.model
    kinds = [kind for kind in _kinds(family) if tells_sizes(family, kind)]
    with registered(family), tempfile.TemporaryDirectory() as folder, quiet():
        if kinds:
            loaded = _saved(instance, equal_plan(model, kinds), Path(folder) / "equal")
            said.append(f"equal layers of {' and '.join(kinds)} load in {loaded}")
        if in_transformers(type(model)):
            plan = _plan(model, _kinds(family), _unit_of(model))
            loaded = _saved(instance, plan, Path(folder) / "unequal", ours=True)
            said.append(f"unequal layers load by {loaded}")
    return said


def equal_plan(model: nn.Module, kinds: Sequence[str]) -> Plan:
    """Keep half of the units of every site."""
    return _plan(model, kinds, _unit_of(model), equal=True)


def _unit_of(model: nn.Module) -> str:
    """Return the unit of attention of which there are several: heads, where all share one key."""
    try:
        return "head" if sites(model, ("attn",))[0].units == 1 else "auto"
    except InputError:  # no attention that can be pruned
        return "auto"


def _plan(model: nn.Module, kinds: Sequence[str], unit: str, equal: bool = False) -> Plan:
    """Keep about half of the units at random; one more in every other block, unless equal."""
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


def wirings_of(family: Family, kind: str) -> list[Wiring]:
    """Return the wirings of a kind of site in all parts of a row."""
    names = ("attn", "cross_attn") if kind == "attn" else (kind,)
    found = [getattr(part, name) for part in family.all_parts for name in names]
    return [wiring for wiring in found if wiring is not None]


def tells_sizes(family: Family, kind: str) -> bool:
    """Tell whether config fields express how many units the sites of a kind have."""
    found = wirings_of(family, kind)
    return bool(found) and all(wiring.config for wiring in found)


def _kinds(family: Family) -> list[str]:
    return [kind for kind in ("attn", "mlp") if wirings_of(family, kind)]


def _has_sdpa(model: nn.Module) -> bool:
    """Tell whether a model can be switched to the attention that torch fuses."""
    can = getattr(model, "_can_set_attn_implementation", None)
    return bool(getattr(model, "_supports_sdpa", False)) and can is not None and can()


def _combinations(model: nn.Module, family: Family) -> Iterator[tuple[list[str], str]]:
    """Yield which kinds of site are pruned together, and by which unit of attention."""
    kinds = _kinds(family)
    for subset in [[kind] for kind in kinds] + [kinds] * (len(kinds) > 1):
        units = ["auto"]
        if "attn" in subset:
            site = sites(model, ("attn",))[0]
            units = ["kv_group", "head"] if site.unit == "kv_group" else ["head"]
            units = [unit for unit in units if sites(model, ("attn",), unit)[0].units > 1]
        yield from ((subset, unit) for unit in units)


def _compare(instance: Instance, kinds: Sequence[str], unit: str, attention: str) -> float:
    """Return by how much a sliced model differs from the one with zeroed columns.

    Raises
    ------
    Refused
        If they differ, the sliced one can't run, or nothing was to be seen.
    """
    dense, sliced = (instance._replace(model=copy.deepcopy(instance.model)) for _ in range(2))
    what = f"with {' and '.join(kinds)} pruned" + f" by {unit}" * ("attn" in kinds)
    for each in (dense, sliced) if attention != "eager" else ():
        each.model.set_attn_implementation(attention)
    plan = _plan(dense.model, kinds, unit)
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
    scale = float(expected.abs().max())
    if float((before - expected).abs().max()) < NOTICED * scale:
        raise Refused(f"{what}, zeroing changes no output, so that nothing can be compared")
    if given.shape != expected.shape:
        raise Refused(f"{what} the outputs have another size")
    error = float((given - expected).abs().max()) / scale
    if not error <= CLOSE:
        raise Refused(f"{what} the outputs are {error:.1e} from those with zeroed columns")
    return error


def _saved(instance: Instance, plan: Plan, folder: Path, ours: bool = False) -> str:
    """Save a pruned model and load it; return by what.

    Raises
    ------
    Refused
        If it doesn't load, or with other outputs.
    """
    pruned = instance._replace(model=copy.deepcopy(instance.model))
    apply_plan(pruned.model, plan)
    expected = outputs(pruned)
    try:
        save_pruned(pruned.model, folder, plan)
        if ours:
            loaded, name = load_pruned(folder, dtype=torch.float64), "liar_ext.load_pruned"
        else:
            stock: Any = type(instance.model)
            loaded = stock.from_pretrained(folder, dtype=torch.float64)
            name = f"{stock.__name__}.from_pretrained"
        make_plain(loaded.config)
        # Buffers were made in float32, of this model as of the one that was saved.
        given = outputs(instance._replace(model=loaded.to(torch.float64).eval()))
    except Exception as error:  # a stranger's class and config have rules of their own
        raise Refused(f"a saved folder doesn't load: {one_line(error, 160)}") from error
    close = CLOSE * float(expected.abs().max())
    if given.shape != expected.shape or not torch.allclose(given, expected, rtol=0, atol=close):
        raise Refused("a saved folder loads with other outputs")
    return name
