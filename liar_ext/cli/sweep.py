"""``liar sweep``: several budgets from one calibration."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
from liar_ext.cli.inputs import add_facts, load
from liar_ext.cli.options import recipe_of
from liar_ext.cli.output import warn
from liar_ext.cli.own_text import let_write
from liar_ext.cli.with_bank import load_by_bank
from liar_ext.errors import InputError
from liar_ext.pipeline.sweep import Point, sweep
from liar_ext.report.report import Report
from liar_ext.report.tables import MEASURES, Table, figure, quality, to_text


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
    folders = {each: Path(options.out, f"keep-{each:g}") for each in keep} if options.out else {}
    if len(set(folders.values())) < len(folders):
        raise InputError("sweep: --keep has fractions that differ by less than a folder's name can")
    for folder in folders.values():
        check_folder(folder, options.overwrite)
    progress, bank = options.progress, None
    if options.bank:
        given, bank, recipe = load_by_bank(options.bank, recipe, options)
    else:
        given = load(recipe, progress=progress)
        let_write(given, recipe, progress=progress)

    def save(pruned: nn.Module, report: Report) -> None:
        add_facts(report, given)
        saving = {"report": report, "tokenizer": given.tokenizer, "start": time.perf_counter()}
        with writing(folders[report.recipe.keep], options.overwrite, checked=True) as path:
            fill_folder(pruned, path, report.plan, **saving)

    points = sweep(
        given.model,
        given.calibration,
        recipe,
        keep=keep,
        bank=bank,
        evaluate_on=given.evaluation,
        on_result=save if folders else None,
        progress=progress,
    )
    dense = _dense(given.model, points)
    rows = [point.to_dict() for point in points]
    for row in rows:
        if folders:
            row["folder"] = str(folders[row["keep"]])
    if options.json:
        print(json.dumps({"dense": dense, "budgets": rows}, indent=1))
        return
    print("\n".join(to_text(table(dense, rows))))
    if not options.quiet:
        warn(given.warnings)


def table(dense: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the dense model and each budget."""
    judged = [name for name in MEASURES if name in dense]
    heads = ("keep", "divergence", "parameters", "of dense", "operations", *judged, "seconds")
    cells = [
        (
            str(row["keep"]),
            figure(row.get("predicted_divergence"), ".4g"),
            f"{row['params']:,}",
            f"{row['params'] / dense['params']:.1%}",
            f"{row['flops']:.1%}",
            *(quality(row.get(name)) for name in judged),
            figure(row.get("seconds"), ".1f"),
        )
        for row in [{"keep": "dense", **dense}, *rows]
    ]
    return Table("", heads, cells, ())


def _dense(model: nn.Module, points: Sequence[Point]) -> dict[str, Any]:
    """Return the row of the dense model."""
    return {"params": count_params(model), "flops": 1.0, **points[0].quality("dense")}
