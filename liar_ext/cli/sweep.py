"""``liar sweep`` and ``liar compare-methods``: several pruned models from one calibration."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn
from typing_extensions import Unpack

from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
from liar_ext.cli.calibrate import load_by_bank
from liar_ext.cli.inputs import let_write, load, load_with_tokenizer
from liar_ext.cli.options import StrPath, given_fields, paths_of, recipe_of
from liar_ext.cli.output import show
from liar_ext.job.sharing import SAME_VOCABULARY, shares_budget
from liar_ext.job.solving import sequences_to_judge
from liar_ext.job.state import tokens_gone
from liar_ext.job.sweeping import Sweep, sweep
from liar_ext.measure.embeddings import Evaluator
from liar_ext.recipe import Recipe
from liar_ext.recipe.checks import CompressOptions, check_keywords
from liar_ext.recipe.fields import recipe_fields
from liar_ext.report.report import Report
from liar_ext.report.sections import vocabulary_lines
from liar_ext.report.tables import Table, figure, measured, quality, to_text
from liar_ext.system.errors import InputError
from liar_ext.system.progress import no_bars, showing_bars


def run(options: argparse.Namespace) -> None:
    """Load, decide, prune and save what is asked for, print the table."""
    keep = options.keep
    del options.keep  # a recipe has one
    recipe = recipe_of(options)
    if len(set(keep)) < len(keep):
        raise InputError(f"sweep: --keep must name each fraction once, got {keep}")
    if not recipe.model or not (options.bank or recipe.calibration):
        raise InputError(
            "sweep: liar sweep needs MODEL and --bank FILE, which liar calibrate writes, or MODEL "
            "and --calibration TEXT, MODEL before it"
        )
    if shares_budget(recipe):
        raise InputError(
            "sweep: --keep-vocab auto takes another vocabulary for each budget of params; give a "
            "number of tokens, or run liar prune for each"
        )
    folders = {each: Path(options.out, f"keep-{each:g}") for each in keep} if options.out else {}
    if len(set(folders.values())) < len(folders):
        raise InputError("sweep: --keep has fractions that differ by less than a folder's name can")
    for folder in folders.values():
        check_folder(folder, options.overwrite)
    given = load_by_bank(recipe, options) if options.bank else load(recipe)
    let_write(given)

    def save(pruned: nn.Module, report: Report) -> None:
        given.add_to(report, pruned)
        saving = {"report": report, "tokenizer": given.tokenizer}
        with writing(folders[report.recipe.keep], options.overwrite) as path:
            fill_folder(pruned, path, report.plan, **saving)

    more = {"bank": given.bank, "evaluate_on": given.evaluation}
    more["on_result"] = save if folders else None
    points = sweep(given.model, given.calibration, given.recipe, keep=keep, **more)
    whole = count_params(given.model) + tokens_gone(given.model)
    dense = {"params": whole, "flops": 1.0, "time": points[0].time and 1.0}
    dense |= points[0].quality("dense")
    rows = [point.to_dict() for point in points]
    for row in rows if folders else ():
        row["folder"] = str(folders[row["keep"]])
    notes = list(given.warnings)
    if given.vocabulary is not None and (facts := given.vocabulary.facts):
        fewer = facts["after"] < facts["before"]
        notes += [SAME_VOCABULARY] * (fewer and bool(measured(dense))) + vocabulary_lines(facts)
    show(options, {"dense": dense, "budgets": rows}, to_text(table(dense, rows)), notes)


def table(dense: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the dense model and each budget."""
    judged = measured(dense)
    predicted = "predicted divergence"  # beside a measured one
    timed = ("predicted time",) if rows[0].get("time") else ()
    heads = ("keep", predicted, "parameters", "of dense", "operations", *timed, *judged, "seconds")
    cells = [
        (
            str(row["keep"]),
            figure(row.get("predicted_divergence"), ".4g"),
            f"{row['params']:,}",
            f"{row['params'] / dense['params']:.1%}",
            f"{row['flops']:.1%}",
            *(f"{row['time']:.1%}" for _ in timed),
            *(quality(row.get(name)) for name in judged),
            figure(row.get("seconds"), ".1f"),
        )
        for row in [{"keep": "dense", **dense}, *rows]
    ]
    return Table("", heads, cells, ())


METHODS = {"liar": "balanced"}  # presets that have another name here
INSTEAD = {
    "calibration": "give it as text",
    "certify": "no errors on fresh text are compared",
    "max_memory": "copies of the model are pruned in memory",
    "overwrite": "nothing is written",
    "preset": "give methods",
    "seed": "give seeds",
}
Row = dict[str, Any]


def run_compare_methods(options: argparse.Namespace) -> None:
    """Prune a copy of the model by each method with each seed, print the table_of_methods."""
    given = given_fields(options)
    if not {"model", "calibration", "eval"} <= given.keys():
        raise InputError(
            "compare-methods: needs MODEL, --calibration TEXT and --eval TEXT, MODEL before them"
        )
    given |= {name: getattr(options, name) for name in ("methods", "seeds", "progress")}
    found = compare_methods(given.pop("model"), given.pop("calibration"), **given)
    show(options, found, to_text(table_of_methods(found["dense"], found["runs"])))


def compare_methods(
    model: StrPath,
    text: StrPath | Sequence[StrPath],
    *,
    methods: Sequence[str] = ("flap", "wanda-sp", "liar"),
    seeds: Sequence[int] = (0, 1),
    progress: bool = False,
    **options: Unpack[CompressOptions],
) -> dict[str, Any]:
    """Prune copies of a model by several methods, and measure each: ``liar compare-methods``.

    Options of the command are keywords, with their defaults there, and hold for all methods::

        found = compare_methods("gpt2", "text.txt", eval="held_out.txt", keep=0.8)
        for run in found["runs"]:
            print(run["method"], run["seed"], run["perplexity"])

    Parameters
    ----------
    model : str or path
        Model folder, hub id, or GGUF file.
    text : str or path, or a sequence of them
        Calibration text.
    methods : sequence of str
        Presets, or ``"liar"`` for ``"balanced"``.
    seeds : sequence of int
        Random seeds: each method is run with each of them.
    progress : bool
        Show progress bars.
    **options
        ``eval``, the held-out text, and other fields of the recipe.

    Returns
    -------
    dict
        What the command prints with ``--json``. ``dense`` has the numbers of the dense model,
        ``runs`` those of each method and seed: ``params``, ``seconds``, and ``perplexity`` or what
        :func:`liar_ext.encoder_similarity` measures.

    Raises
    ------
    InputError
        If a file, the model or an option cannot be used.
    """
    known = CompressOptions.__annotations__
    check_keywords("compare_methods", options, known, INSTEAD)
    if options.get("eval") is None:
        raise InputError("compare_methods: needs held-out text; give eval='held_out.txt', say")
    if options.get("keep_vocab", 1.0) != 1.0:
        raise InputError(
            "recipe: keep_vocab can't be compared, as every method would have the same tokens; "
            "prune with it and keep 1 first, and compare methods on that folder"
        )
    methods = [methods] if isinstance(methods, str) else list(methods)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    for name, given in {"methods": methods, "seeds": seeds}.items():
        if not given or len(set(given)) < len(given):
            raise InputError(f"compare_methods: {name} must name some, each once, got {given}")
    calibration = paths_of("compare_methods", text)
    shared = {**options, "model": os.fspath(model), "calibration": calibration}
    recipes = {
        (method, seed): Recipe.build(preset=METHODS.get(method, method), **{**shared, "seed": seed})
        for seed in seeds
        for method in methods
    }
    with showing_bars(progress), nullcontext() if progress else no_bars():
        dense, rows = compare(recipes)
    return {"dense": dense, "runs": rows}


def compare(recipes: Mapping[tuple[str, int], Recipe]) -> tuple[Row, list[Row]]:
    """Return the numbers of the dense model, and of each recipe, by method and seed.

    Recipes on the same text share its statistics.
    """
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for key, recipe in recipes.items():
        inputs = (getattr(recipe, each.name) for each in recipe_fields(affects="inputs"))
        groups.setdefault((recipe.seed, *inputs), []).append(key)
    dense, rows, loader, measure = None, [], cache(load_with_tokenizer), Evaluator()
    for keys in groups.values():
        first = recipes[keys[0]]
        judge = max(sequences_to_judge(recipes[key]) for key in keys)
        texts = load(first, loader=loader, judge=judge)
        let_write(texts)
        if dense is None:
            dense = _numbers(measure, texts.model, texts.evaluation)
        work = Sweep(texts.model, texts.calibration, judge_on=texts.judging)
        for method, seed in keys:
            pruned, point = work.prune(recipes[method, seed])
            found = _numbers(measure, pruned, texts.evaluation)
            rows.append({"method": method, "seed": seed, **found, "seconds": point.seconds})
    return dense, rows


def table_of_methods(dense: Row, rows: Sequence[Row]) -> Table:
    """Return a row for the dense model, and one for each method over its seeds.

    They are judged by the perplexity, or the first that there is of the measures of an encoder.
    """
    by_method = {"dense": [dense]}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    measure, cells = next(iter(measured(dense))), []
    for method, runs in by_method.items():
        found = [row[measure] for row in runs]
        spread = (min(found), max(found)) if len(found) > 1 else (None, None)
        spent = mean(row["seconds"] for row in runs) if "seconds" in runs[0] else None
        numbers = [quality(each) for each in (mean(found), *spread)]
        params = mean(row["params"] for row in runs)
        cells.append((method, f"{params:,.0f}", *numbers, figure(spent, ".1f")))
    heads = ("method", "parameters", measure, "lowest seed", "highest seed", "seconds")
    return Table("", heads, cells)


def _numbers(measure: Evaluator, model: nn.Module, batches: Any) -> Row:
    return {"params": count_params(model), **measured(measure(model, batches))}
