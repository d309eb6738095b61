"""Write a pruned folder with unequal layers as one with equal layers, padded with zeros."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.folder import PLAN_FILE, RECIPE_YAML, REPORT_JSON, count_params, run_on
from liar_ext.checkpoint.inspection import read_config
from liar_ext.checkpoint.loading import read_plan
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import dense_config, equal_config, how_to_load
from liar_ext.export import is_unequal, stored_dtype
from liar_ext.models.plan import Plan, SitePlan, kind_of
from liar_ext.models.registry import skeleton
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import draw_inputs
from liar_ext.models.sites import Site, sites
from liar_ext.models.slicing import apply_plan, unit_slices
from liar_ext.models.whole import refuse_experts
from liar_ext.system.errors import InputError, typed
from liar_ext.system.files import read_json


def export(folder: Path, out: Path, *, multiple_of: int = 1) -> list[str]:
    """Write ``folder`` with equal layers.

    Parameters
    ----------
    folder, out : Path
        The model folder, and the folder to write.
    multiple_of : int
        The MLP gets a multiple of this many channels, as group quantisation and hardware want it,
        if the dense model has as many.
    """
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise InputError(
            f"export: --multiple-of must be an integer of at least 1, got {multiple_of!r}"
        )
    fields = read_config(folder, "export")
    if not is_unequal(fields):
        raise InputError(
            f"export: --to uniform: {folder.name} needs no code to load as it is, its layers being "
            "equal; use the folder itself"
        )
    plan, stored = read_plan(folder / PLAN_FILE, "export"), stored_dtype(fields)
    model, tokenizer = load_model(folder, stored if hasattr(torch, stored) else "float32")
    found = sites(model, attn_unit=plan.attn_unit)
    instead = "prune with --uniform-layers, which keeps equally many units of all layers"
    refuse_experts(found, "export: --to uniform: zeros are put into", instead)
    for site in found:
        if site.name in plan.sites and len(plan.sites[site.name].kept) != site.units:
            raise InputError(
                f"export: --to uniform: {PLAN_FILE} keeps {len(plan.sites[site.name].kept)} units "
                f"of {site.name}, the weights have {site.units}; copy the folder again"
            )
    config = dense_config(model.config)
    hidden, blocks = plan.hidden, plan.blocks
    plan = replace(plan, blocks=None)  # as the config says
    whole = skeleton(type(model), config)
    if hidden is not None and hidden_of(whole).size != hidden.units:
        plan = replace(plan, hidden=None)  # the config says the smaller hidden size
    before, plan = _rounds(plan, whole, found)
    wide = _widest(model, config, plan, multiple_of)
    padded = type(model)(copy.deepcopy(config)).to(model.dtype).eval()
    if model.can_generate():
        padded.generation_config = model.generation_config
    apply_plan(padded, wide)
    _fill(padded, model, plan, wide)
    difference = _difference(model, padded)
    wide = replace(wide.after(before), hidden=hidden, blocks=blocks)
    counts = {"before": count_params(model), "after": count_params(padded)}
    report = read_json(folder / REPORT_JSON, "export") if (folder / REPORT_JSON).is_file() else {}
    report["uniform"] = {"source": folder.name, "params": counts}
    report["loading"] = how_to_load(padded, wide)
    save_pruned(padded, out, wide, report=report, tokenizer=tokenizer)
    return _notes(folder, plan, wide, counts, difference)


def _rounds(plan: Plan, whole: nn.Module, found: list[Site]) -> tuple[Plan, Plan]:
    """Split a plan: the first part leaves the config's model, which an earlier job had pruned."""
    before, after = {}, {}
    for ours, theirs in zip(found, sites(whole, attn_unit=plan.attn_unit), strict=True):
        if ours.name in plan.sites:
            site, size = plan.sites[ours.name], theirs.units
            if ours.width != theirs.width or not ours.units <= size <= site.units:
                raise InputError(
                    f"export: --to uniform: no config of {plan.model_type} says equal layers that "
                    f"are as wide in {ours.kind}; prune with --uniform-layers"
                )
            before[ours.name] = _widened(site, size, ours.groups)
            kept = (i for i, unit in enumerate(before[ours.name].kept) if unit in site.kept)
            after[ours.name] = SitePlan(size, tuple(kept), site.bias)
    return Plan(plan.model_type, plan.attn_unit, before), replace(plan, sites=after)


def _widest(model: nn.Module, config: Any, plan: Plan, multiple_of: int) -> Plan:
    """Return the least plan with equal layers that holds all that a plan keeps.

    A config may refuse or derive head counts: then more units come back, up to all there were.
    """
    whole = {name: replace(s, kept=tuple(range(s.units))) for name, s in plan.sites.items()}
    chosen, tied = replace(plan, sites=whole), {}  # sites by what says their number
    for site in sites(model, attn_unit=plan.attn_unit):
        fields = (site.kind, site.part.config, *(site.wiring.config or ()))
        tied.setdefault(fields, []).append(site)
    for (kind, *_), some in sorted(tied.items()):
        own = {site.name: plan.sites[site.name] for site in some if site.name in plan.sites}
        if not own:
            continue
        units, runs = max(site.units for site in own.values()), some[0].groups
        least = max(len(site.kept) for site in own.values())
        if kind == "mlp":
            least = min(units, -(-least // multiple_of) * multiple_of)
        everything = len(own) < len(some) or not some[0].wiring.config
        tries = range(units if everything else least, units + 1, runs)
        for count in tries if kind == "attn" else sorted({tries[0], units}):
            more = {name: _widened(site, count, runs) for name, site in own.items()}
            found = replace(chosen, sites={**chosen.sites, **more})
            if _builds(type(model), config, found, kind):
                chosen = found
                break
        else:
            raise InputError(
                f"export: --to uniform: no config of {plan.model_type} says equal layers that are "
                f"as wide in {kind}; prune with --uniform-layers, or with --reconstruct linear"
            )
    return chosen


def _widened(site: SitePlan, count: int, runs: int) -> SitePlan:
    """Return the plan of a site that keeps ``count`` units; those that come back are the first."""
    run, kept = site.units // runs, set(site.kept)
    for start in range(0, site.units, run):
        here = range(start, start + run)
        missing = count // runs - sum(unit in kept for unit in here)
        kept |= set([unit for unit in here if unit not in kept][:missing])
    return replace(site, kept=tuple(sorted(kept)))


def _builds(stock: type[nn.Module], config: Any, plan: Plan, kind: str) -> bool:
    """Tell whether a config says the layers of a plan; for "attn" the MLP stays dense."""
    # The MLP comes last: with all the others.
    own = {n: site for n, site in plan.sites.items() if kind == "mlp" or kind_of(n) == kind}
    shapes = skeleton(stock, config)
    apply_plan(shapes, replace(plan, sites=own))
    return equal_config(shapes, config) is not None


@torch.no_grad()
def _fill(padded: nn.Module, model: nn.Module, plan: Plan, wide: Plan) -> None:
    """Copy the weights of a model into the wider one, whose other weights become zero."""
    places: dict[str, list] = {}  # of parameters: a dimension, and what is kept of it
    for site in sites(padded, attn_unit=plan.attn_unit):
        if site.name in plan.sites:
            at = {unit: index for index, unit in enumerate(wide.sites[site.name].kept)}
            kept = [at[unit] for unit in plan.sites[site.name].kept]
            places |= {path: each for path, *each in unit_slices(padded, site, kept)}
    theirs = dict(model.named_parameters())
    for path, parameter in padded.named_parameters():
        source = theirs.get(path)
        parameter.zero_()
        if path in places and source is not None:  # a bias that only some layers have may lack
            dim, index = places[path]
            parameter.index_copy_(dim, index.to(parameter.device), source)
        elif source is not None:
            parameter.copy_(source)


def _difference(model: nn.Module, padded: nn.Module) -> float:
    """Return the largest difference of outputs, relative to the largest; refuse a large one."""
    inputs = draw_inputs(model, 1, 24, torch.Generator().manual_seed(0))
    ours, theirs = (run_on(each, inputs).double() for each in (model, padded))
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= torch.finfo(model.dtype).eps ** 0.5:
        raise InputError(
            f"export: --to uniform: the padded model's outputs differ by {difference:.1e}; nothing "
            "was written, use the folder itself"
        )
    return difference


def _notes(
    folder: Path, plan: Plan, wide: Plan, counts: dict[str, int], difference: float
) -> list[str]:
    sizes = []
    for kind in ("attn", "mlp"):
        old = [len(site.kept) for name, site in plan.sites.items() if kind_of(name) == kind]
        new = {len(site.kept) for name, site in wide.sites.items() if kind_of(name) == kind}
        if old:
            sizes.append(f"{kind} {min(old)} to {max(old)} units, now {max(new)}")
    share = counts["after"] / counts["before"] - 1
    lost = all(len(site.kept) == site.units for site in wide.sites.values())
    return [
        f"Layers padded with zeros ({'; '.join(sizes)}): outputs differ by {difference:.1e} of "
        "the largest.",
        f"{counts['before']:,} parameters became {counts['after']:,} (+{share:.1%}). With liar "
        f"prune --recipe {typed(folder / RECIPE_YAML)} --uniform-layers --out DIR layers are equal "
        "at its budget.",
        *(["Nothing is saved: the widest layers are those of the dense model."] if lost else []),
    ]
