"""``liar export --to uniform --source MODEL``: the folder's job again, with equal layers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError
from liar_ext.recipe import Recipe


def replan(
    folder: str,
    out: str | None,
    *,
    source: str,
    texts: Sequence[str] | None = None,
    multiple_of: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Any:
    """Prune ``source`` by the recipe in a folder, with layers of equal sizes.

    Returns
    -------
    Exported
        The new folder; its notes have the numbers of both reports, side by side.

    Raises
    ------
    InputError
        If the folder has no recipe, or the job can't be done.
    """
    from liar_ext.export.exporting import model_folder, write_export

    path = model_folder(folder)
    recipe = _recipe(path, source, texts, multiple_of)
    options = {"source": source, "texts": list(texts or ()), "multiple_of": multiple_of}
    return write_export(
        path,
        "uniform",
        out,
        lambda target: _prune(path, target, recipe, progress),
        overwrite=overwrite,
        options=options,
    )


def _recipe(
    folder: Path, source: str, texts: Sequence[str] | None, multiple_of: int | None
) -> Recipe:
    """Return the recipe of a folder, for another job."""
    from liar_ext.checkpoint.names import RECIPE_YAML

    if not (folder / RECIPE_YAML).is_file():
        raise InputError(
            f"export: {folder} has no {RECIPE_YAML}, the choices of the job that --source repeats; "
            "leave --source out, or prune again with liar prune --uniform-layers"
        )
    changes: dict[str, Any] = {"model": source, "uniform_layers": True}
    changes |= {"calibration": tuple(texts)} if texts else {}
    changes |= {"multiple_of": multiple_of} if multiple_of else {}
    recipe = Recipe.build(Recipe.load(folder / RECIPE_YAML), **changes)
    if not recipe.calibration:
        raise InputError("export: the recipe names no calibration text; give --texts TEXT ...")
    return recipe


def _prune(folder: Path, out: Path, recipe: Recipe, progress: bool) -> Any:
    """Run a job and write its folder; pad it where no config says layers of these sizes."""
    from liar_ext.checkpoint.inspection import read_config, read_json
    from liar_ext.checkpoint.names import REPORT_JSON
    from liar_ext.checkpoint.saving import save_pruned
    from liar_ext.cli.prune import load, prune_given
    from liar_ext.export.formats import Exported, is_unequal
    from liar_ext.export.uniform import export as pad

    given = load(recipe, progress=progress)
    report = prune_given(given, recipe, progress=progress)
    save_pruned(given.model, out, report.plan, report=report, tokenizer=given.tokenizer)
    before = read_json(folder / REPORT_JSON, "export") if (folder / REPORT_JSON).is_file() else {}
    notes = compare(before, json.loads(report.to_json()))
    if is_unequal(read_config(out, "export")):
        own = out.with_name(f"{out.name}.sizes")
        out.rename(own)
        notes += pad(own, out, progress=progress).notes[:1]
    return Exported("uniform", (out,), tuple(notes))


def compare(unequal: Mapping[str, Any], equal: Mapping[str, Any]) -> list[str]:
    """Return the numbers of two reports that both have, a line each."""
    lines = []
    ours, theirs = numbers(unequal), numbers(equal)
    for name in theirs:
        if name in ours:
            lines.append(f"{name}: {ours[name]:,.6g} unequal, {theirs[name]:,.6g} equal layers")
    return lines or ["The folder has no report to compare with."]


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a report that judge a plan, as far as it has them."""
    found: dict[str, Any] = {}
    settings, evaluation = _part(report, "settings"), _part(report, "evaluation")
    found["parameters"] = _part(report, "params").get("after")
    found["predicted divergence"] = settings.get("predicted_divergence")
    found["measured divergence"] = settings.get("measured_divergence")
    found["perplexity"] = _part(evaluation, "pruned").get("perplexity")
    found["perplexity of the dense model"] = _part(evaluation, "dense").get("perplexity")
    sites = report.get("sites")
    errors = [
        site.get("holdout_error")
        for site in (sites if isinstance(sites, list) else [])
        if isinstance(site, dict)
    ]
    errors = [error for error in errors if _is_number(error)]
    if errors:
        found["mean held-out error of the sites"] = statistics.fmean(errors)
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = facts.get(name)
    return part if isinstance(part, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
