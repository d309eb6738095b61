"""``liar compare-methods``: perplexity of several methods at one budget, over several seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from torch import nn

from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.cli.inputs import load, load_with_tokenizer
from liar_ext.cli.own_text import let_write
from liar_ext.errors import InputError
from liar_ext.evaluation import perplexity
from liar_ext.pipeline.choosing import sequences_to_judge
from liar_ext.pipeline.sweep import Sweep
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields
from liar_ext.report.tables import Table, figure, to_text

METHODS = {"liar": "balanced"}  # presets that have another name here
Row = dict[str, Any]


def run(options: argparse.Namespace) -> None:
    """Prune a copy of the model by each method with each seed, print the table."""
    names = [each.name for each in recipe_fields() if hasattr(options, each.name)]
    given = {name: getattr(options, name) for name in names}
    if not {"model", "calibration", "eval"} <= given.keys():
        raise InputError(
            "compare-methods: needs MODEL, --calibration TEXT and --eval TEXT, MODEL before them"
        )
    for name in ("methods", "seeds"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            raise InputError(f"compare-methods: --{name} must name each once")
    recipes = {
        (method, seed): Recipe.build(preset=METHODS.get(method, method), **{**given, "seed": seed})
        for seed in options.seeds
        for method in options.methods
    }
    dense, rows = compare(recipes, progress=options.progress)
    if options.json:
        print(json.dumps({"dense": dense, "runs": rows}, indent=1))
        return
    print("\n".join(to_text(table(dense, rows))))


def compare(
    recipes: Mapping[tuple[str, int], Recipe], progress: bool = False
) -> tuple[Row, list[Row]]:
    """Return the numbers of the dense model, and of each recipe, by method and seed.

    Recipes on the same text share its statistics.
    """
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for key, recipe in recipes.items():
        inputs = (getattr(recipe, each.name) for each in recipe_fields(affects="inputs"))
        groups.setdefault((recipe.seed, *inputs), []).append(key)
    dense, rows, loaded = None, [], {}

    def loader(*where: str) -> tuple[nn.Module, Any]:
        if where not in loaded:
            loaded[where] = load_with_tokenizer(*where)
        return loaded[where]

    for keys in groups.values():
        first = recipes[keys[0]]
        judge = max(sequences_to_judge(recipes[key]) for key in keys)
        texts = load(first, loader=loader, judge=judge, progress=progress)
        let_write(texts, first, progress=progress)
        if dense is None:
            dense = _numbers(texts.model, texts.evaluation, progress)
        work = Sweep(texts.model, texts.calibration, progress=progress, judge_on=texts.judging)
        for method, seed in keys:
            pruned, point = work.prune(recipes[method, seed])
            found = _numbers(pruned, texts.evaluation, progress)
            rows.append({"method": method, "seed": seed, **found, "seconds": point.seconds})
    return dense, rows


def table(dense: Row, rows: Sequence[Row]) -> Table:
    """Return a row for the dense model, and one for each method over its seeds."""
    by_method = {"dense": [dense]}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    cells = []
    for method, runs in by_method.items():
        found = [row["perplexity"] for row in runs]
        spread = (min(found), max(found)) if len(found) > 1 else (None, None)
        spent = mean(row["seconds"] for row in runs) if "seconds" in runs[0] else None
        numbers = [figure(each, ".2f") for each in (mean(found), *spread)]
        params = mean(row["params"] for row in runs)
        cells.append((method, f"{params:,.0f}", *numbers, figure(spent, ".1f")))
    heads = ("method", "parameters", "perplexity", "lowest seed", "highest seed", "seconds")
    return Table("", heads, cells)


def _numbers(model: nn.Module, batches: Any, progress: bool) -> Row:
    """Return parameters and perplexity of a model."""
    found = perplexity(model, batches, progress=progress)["perplexity"]
    return {"params": count_params(model), "perplexity": found}
