"""Write a pruned folder with unequal layers as one with equal layers, with the same outputs.

Every layer gets as many units as the widest one; those that are added are zero. With the kept units
K of a site and the units Z that come back as zeros, in the order of the dense model::

    producers   W[rows of K] stay, W[rows of Z] = 0, and so for biases
    consumer    W[:, columns of K] stay, W[:, columns of Z] = 0

A zero channel writes zero into the stream. A zero KV group attends evenly and reads zeros. So the
outputs are the same, stock loaders take the folder, and the price is parameters and time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.checkpoint.inspection import read_config, read_json
from liar_ext.checkpoint.names import PLAN_FILE, RECIPE_YAML, REPORT_JSON
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import equal_config, how_to_load
from liar_ext.errors import InputError
from liar_ext.export.formats import Exported, is_unequal
from liar_ext.models.experts import refuse_experts
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.running import draw_inputs, output_of
from liar_ext.models.sites import Site, sites, skeleton
from liar_ext.models.slicing import apply_plan, unit_rows
from liar_ext.plan import Plan, SitePlan, kind_of

# What a config says of unequal layers, and of what was saved.
MARKS = ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map", "liar")


def export(folder: Path, out: Path, *, progress: bool = True, multiple_of: int = 1) -> Exported:
    """Write ``folder`` with equal layers.

    Parameters
    ----------
    folder, out, progress
        As :mod:`liar_ext.export.formats` says.
    multiple_of : int
        The MLP gets a multiple of this many channels, as group quantisation and hardware want it,
        if the dense model has as many.

    Raises
    ------
    InputError
        If the folder loads without code already, has no plan, or no config of the family can say
        equal layers that are as wide.
    """
    if multiple_of < 1:
        raise InputError(f"export: --multiple-of must be at least 1, got {multiple_of}")
    fields = read_config(folder, "export")
    if not is_unequal(fields):
        raise InputError(
            f"export: --to uniform: {folder.name} needs no code to load as it is, its layers being "
            "equal; use the folder itself"
        )
    plan = _read_plan(folder)
    stored = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
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
    config = _dense_config(model.config)
    hidden = plan.hidden
    if hidden is not None and hidden_of(skeleton(type(model), config)).size != hidden.units:
        plan = replace(plan, hidden=None)  # the config says the smaller hidden size
    wide = _widest(model, config, plan, multiple_of)
    padded = type(model)(copy.deepcopy(config)).to(model.dtype).eval()
    apply_plan(padded, wide)
    _fill(padded, model, plan, wide)
    difference = _difference(model, padded)
    wide = replace(wide, hidden=hidden)
    counts = {"before": count_params(model), "after": count_params(padded)}
    report = _report(folder, counts) | {"loading": how_to_load(padded, wide)}
    save_pruned(padded, out, wide, report=report, tokenizer=tokenizer)
    return Exported("uniform", (out,), _notes(folder.name, plan, wide, counts, difference))


def _read_plan(folder: Path) -> Plan:
    """Return the plan of a folder; it says which units of the dense model are there."""
    if not (folder / PLAN_FILE).is_file():
        raise InputError(
            f"export: --to uniform: {folder} has no {PLAN_FILE}, which says what its layers keep; "
            "copy the folder again, or prune again with --uniform-layers"
        )
    return Plan.from_json(json.dumps(read_json(folder / PLAN_FILE, "export")))


def _dense_config(config: Any) -> Any:
    """Return a config from which the dense model is built."""

    def without_marks(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: without_marks(each) for key, each in value.items() if key not in MARKS}

    return type(config).from_dict(without_marks(config.to_dict()))


def _widest(model: nn.Module, config: Any, plan: Plan, multiple_of: int) -> Plan:
    """Return the least plan with equal layers that holds all that a plan keeps.

    A config may refuse head counts (one that doesn't divide the hidden size), or derive them: then
    more units come back, up to all of the dense model.
    """
    chosen = plan
    for kind in ("attn", "mlp"):
        own = {name: site for name, site in plan.sites.items() if kind_of(name) == kind}
        if not own:
            continue
        units = max(site.units for site in own.values())
        least = max(len(site.kept) for site in own.values())
        everything = len(own) < sum(site.kind == kind for site in sites(model, (kind,)))
        if kind == "mlp":
            least = min(units, -(-least // multiple_of) * multiple_of)
        runs = _runs(model, plan, kind)
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


def _runs(model: nn.Module, plan: Plan, kind: str) -> int:
    """Return how many equal runs the units of a kind fall into."""
    return sites(model, (kind,), plan.attn_unit)[0].groups


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
    own = {name: site for name, site in plan.sites.items() if kind_of(name) == kind}
    if kind == "mlp":  # the last one: with all the others
        own = dict(plan.sites)
    shapes = skeleton(stock, config)
    apply_plan(shapes, replace(plan, sites=own))
    return equal_config(shapes, config) is not None


@torch.no_grad()
def _fill(padded: nn.Module, model: nn.Module, plan: Plan, wide: Plan) -> None:
    """Copy the weights of a model into the wider one, whose other weights become zero."""
    ours = {site.name: site for site in sites(padded, attn_unit=plan.attn_unit)}
    places: dict[str, tuple[Tensor | None, Tensor | None, bool]] = {}
    for name, site_plan in plan.sites.items():
        site, at = ours[name], {unit: i for i, unit in enumerate(wide.sites[name].kept)}
        kept = [at[unit] for unit in site_plan.kept]
        _place(padded, site, kept, places)
    theirs = dict(model.named_parameters())
    for path, parameter in padded.named_parameters():
        layer, _, kind = path.rpartition(".")
        rows, columns, transposed = places.get(layer, (None, None, False))
        source = theirs.get(path)
        parameter.zero_()
        if source is None:  # a bias that only some layers have
            continue
        first, second = (columns, rows) if transposed else (rows, columns)
        if kind == "bias":
            first, second = rows, None
        target = parameter
        if first is not None:
            target.index_copy_(0, first.to(target.device), source)
        elif second is not None:
            target.index_copy_(1, second.to(target.device), source)
        else:
            target.copy_(source)


def _place(
    padded: nn.Module,
    site: Site,
    kept: list[int],
    places: dict[str, tuple[Tensor | None, Tensor | None, bool]],
) -> None:
    """Note which rows of producers, and which columns of the consumer, hold the kept units."""
    transposed = site.wiring.transposed
    for path in site.producers:
        weight = padded.get_submodule(path).weight
        places[path] = (
            unit_rows(site, path, kept, weight.shape[1 if transposed else 0]),
            None,
            transposed,
        )
    places[site.consumer] = (None, site.features(kept), transposed)


@torch.no_grad()
def _difference(model: nn.Module, padded: nn.Module) -> float:
    """Return the largest difference of outputs, relative to the largest output.

    Raises
    ------
    InputError
        If it isn't that of rounding.
    """
    values = draw_inputs(model, 1, 24, torch.Generator().manual_seed(0))
    found = []
    for each in (model, padded):
        inputs = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in values.items()
        }
        found.append(output_of(each, each(**inputs))[1].double())
    difference = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    if not difference <= torch.finfo(model.dtype).eps ** 0.5:
        raise InputError(
            f"export: --to uniform: the padded model's outputs differ by {difference:.1e}; nothing "
            "was written, use the folder itself"
        )
    return difference


def _report(folder: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Return the report of a folder, with what padding did."""
    fields = read_json(folder / REPORT_JSON, "export") if (folder / REPORT_JSON).is_file() else {}
    return {**fields, "uniform": {"source": folder.name, "params": counts}}


def _notes(
    folder: str, plan: Plan, wide: Plan, counts: dict[str, int], difference: float
) -> tuple[str, ...]:
    sizes = []
    for kind in ("attn", "mlp"):
        old = [len(site.kept) for name, site in plan.sites.items() if kind_of(name) == kind]
        new = {len(site.kept) for name, site in wide.sites.items() if kind_of(name) == kind}
        if old:
            sizes.append(f"{kind} {min(old)} to {max(old)} units, now {max(new)}")
    share = counts["after"] / counts["before"] - 1
    lost = all(len(site.kept) == site.units for site in wide.sites.values())
    return (
        f"Layers padded with zeros ({'; '.join(sizes)}): outputs differ by {difference:.1e} of "
        "the largest.",
        f"{counts['before']:,} parameters became {counts['after']:,} (+{share:.1%}). With liar "
        f"prune --recipe {folder}/{RECIPE_YAML} --uniform-layers layers are equal at its budget.",
        *(["Nothing is saved: the widest layers are those of the dense model."] if lost else []),
    )
