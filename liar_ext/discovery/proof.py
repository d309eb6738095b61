"""Prove a row on tiny instances: sliced equals zeroed, in every combination, and it loads."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.loading import load_pruned
from liar_ext.checkpoint.quietening import quiet
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import in_transformers
from liar_ext.discovery.instance import Instance, Refused, outputs, plain
from liar_ext.discovery.rows import registered
from liar_ext.errors import InputError, one_line
from liar_ext.models.family import Family, Wiring
from liar_ext.models.sites import get_consumer_weight, sites
from liar_ext.plan import Plan, SitePlan
from liar_ext.surgery.units import apply_plan

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
    said = []
    kinds = [kind for kind in ("attn", "mlp") if tells_sizes(family, kind)]
    with registered(family), tempfile.TemporaryDirectory() as folder, quiet():
        if kinds:
            loaded = saved(instance, equal_plan(instance.model, kinds), Path(folder) / "equal")
            said.append(f"equal layers of {' and '.join(kinds)} load in {loaded}")
        if in_transformers(type(instance.model)):
            plan = make_plan(instance.model, _kinds(family), unit_of(instance.model))
            loaded = saved(instance, plan, Path(folder) / "unequal", ours=True)
            said.append(f"unequal layers load by {loaded}")
    return said


def make_plan(model: nn.Module, kinds: Sequence[str], unit: str) -> Plan:
    """Keep about half of the units, one more in every other block, at random."""
    return _plan(model, kinds, unit, equal=False)


def equal_plan(model: nn.Module, kinds: Sequence[str]) -> Plan:
    """Keep half of the units of every site."""
    return _plan(model, kinds, unit_of(model), equal=True)


def unit_of(model: nn.Module) -> str:
    """Return the unit of attention of which there are several: heads, where all share one key."""
    try:
        return "head" if sites(model, ("attn",))[0].units == 1 else "auto"
    except InputError:  # no attention that can be pruned
        return "auto"


def _plan(model: nn.Module, kinds: Sequence[str], unit: str, *, equal: bool) -> Plan:
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
    names = ("attn", "cross_attn") if kind == "attn" else ("mlp", "shared_mlp")
    found = [getattr(part, name) for part in family.all_parts for name in names]
    return [wiring for wiring in found if wiring is not None]


def tells_sizes(family: Family, kind: str) -> bool:
    """Tell whether config fields express how many units the sites of a kind have."""
    fields = [set((wiring.config or {}).values()) for wiring in wirings_of(family, kind)]
    return bool(fields) and all(sizes - {"experts"} for sizes in fields)


def _kinds(family: Family) -> list[str]:
    return [kind for kind in ("attn", "mlp") if wirings_of(family, kind)]


def _has_sdpa(model: nn.Module) -> bool:
    """Tell whether a model can be switched to the attention that torch fuses."""
    can = getattr(model, "_can_set_attn_implementation", None)
    return bool(getattr(model, "_supports_sdpa", False)) and can is not None and can()


def _combinations(model: nn.Module, family: Family) -> Iterator[tuple[list[str], str]]:
    """Yield which kinds of site are pruned together, and by which unit of attention."""
    kinds = _kinds(family)
    subsets = [[kind] for kind in kinds] + ([kinds] if len(kinds) > 1 else [])
    for subset in subsets:
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
    dense, sliced = copy.deepcopy(instance.model), copy.deepcopy(instance.model)
    what = f"{' and '.join(kinds)} pruned by {unit}" if "attn" in kinds else "mlp pruned"
    for model in (dense, sliced):
        if attention != "eager":
            model.set_attn_implementation(attention)
    plan = make_plan(dense, kinds, unit)
    before = outputs(dense, instance.inputs)
    for site in sites(dense, kinds, unit):
        removed = site.features(plan.sites[site.name].removed)
        get_consumer_weight(dense, site)[:, removed] = 0
    expected = outputs(dense, instance.inputs)

    def given() -> Tensor:
        apply_plan(sliced, plan)
        return outputs(sliced, instance.inputs)

    return compared(f"with {what}", before, expected, given)


def compared(what: str, before: Tensor, expected: Tensor, give: Callable[[], Tensor]) -> float:
    """Return by how much a sliced model's outputs differ from what is expected of them.

    Parameters
    ----------
    what : str
        What was done, as in "with mlp pruned".
    before, expected : Tensor
        Outputs of the dense model, and of that without what was sliced.
    give : callable
        Slices and gives the outputs.

    Raises
    ------
    Refused
        If they differ, the sliced model can't run, or nothing was to be seen.
    """
    try:
        given = give()
    except Exception as error:  # whatever a stranger's forward raises
        raise Refused(
            f"{what} the model fails: {type(error).__name__}: {one_line(error, 120)}"
        ) from error
    scale = float(expected.abs().max())
    if float((before - expected).abs().max()) < NOTICED * scale:
        raise Refused(f"{what}, zeroing changes no output, so that nothing can be compared")
    if given.shape != expected.shape:
        raise Refused(f"{what} the outputs have another size")
    error = float((given - expected).abs().max()) / scale
    if not error <= CLOSE:
        raise Refused(f"{what} the outputs are {error:.1e} from those with zeroed columns")
    return error


def saved(instance: Instance, plan: Plan, folder: Path, ours: bool = False) -> str:
    """Save a pruned model and load it; return by what.

    Raises
    ------
    Refused
        If it doesn't load, or with other outputs.
    """
    model = copy.deepcopy(instance.model)
    apply_plan(model, plan)
    expected = outputs(model, instance.inputs)
    try:
        save_pruned(model, folder, plan)
        if ours:
            loaded, name = load_pruned(folder, dtype=torch.float64), "liar_ext.load_pruned"
        else:
            stock: Any = type(instance.model)
            loaded = stock.from_pretrained(folder, dtype=torch.float64)
            name = f"{stock.__name__}.from_pretrained"
        plain(loaded.config)
        # Buffers were made in float32, of this model as of the one that was saved.
        given = outputs(loaded.to(torch.float64).eval(), instance.inputs)
    except Exception as error:  # a stranger's class and config have rules of their own
        raise Refused(f"a saved folder doesn't load: {one_line(error, 160)}") from error
    close = CLOSE * float(expected.abs().max())
    if given.shape != expected.shape or not torch.allclose(given, expected, rtol=0, atol=close):
        raise Refused("a saved folder loads with other outputs")
    return name
