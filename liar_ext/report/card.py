"""The model card of a pruned folder: what was done, the numbers, how to load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from liar_ext.plan import kind_of
from liar_ext.report import markdown

if TYPE_CHECKING:
    from liar_ext.report.report import Report


def card(report: Report, license_name: str | None = None) -> str:
    """Return the text of README.md, with the metadata that model hubs read at its top."""
    name = Path(report.model).name or report.model
    is_local = Path(report.model).is_absolute() or Path(report.model).exists()
    front = {
        "library_name": "transformers",
        **({} if is_local else {"base_model": report.model}),
        **({"license": license_name} if license_name else {}),
        "tags": ["pruned", "structured-pruning", "liar"],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---"]
    lines += ["", f"# {_plain(name)}, pruned", "", *_what_was_done(report)]
    lines += ["", *markdown.size_table(report)]
    lines += ["", "## How to load", "", report.loading or "With `liar_ext.load_pruned(folder)`."]
    lines += ["", "`liar verify FOLDER` reloads it and compares its outputs with the saved ones."]
    if report.warnings:
        lines += ["", "## What to know", "", *(f"- {_plain(said)}" for said in report.warnings)]
    lines += ["", "Every number of the job is in `liar/report.md`, every choice in"]
    if report.recipe is not None and report.recipe.calibration:
        lines += ["`liar/recipe.yaml`: `liar prune --recipe liar/recipe.yaml` repeats it."]
    else:
        lines += ["`liar/recipe.yaml`, but for the calibration text, which was given in Python."]
    return "\n".join(lines) + "\n"


def _plain(said: str) -> str:
    """Return text as one line of Markdown that shows it: names of files may hold markup."""
    shown = "".join(each if each.isprintable() else "\ufffd" for each in " ".join(said.split()))
    return re.sub(r"([\\`<>&#|\[\]])", r"\\\1", shown)


def _what_was_done(report: Report) -> list[str]:
    settings, sites = report.settings, report.sites
    kinds = {"attn": "attention heads", "mlp": "MLP channels"}
    cut = {kind_of(row.name) for row in sites if row.units_after < row.units_before}
    what = [text for kind, text in kinds.items() if kind in cut]
    what += ["hidden features"] if report.hidden else []
    lines = [
        f"{' and '.join(what) or 'Nothing'} removed without retraining: the units that stay "
        "interpolate the removed ones (LIAR, arXiv 2407.13331), and the interpolation is folded "
        "into the weights.",
        "",
        f"Importance: `{settings.get('criterion')}`. Allocation: `{settings.get('allocation')}`. "
        f"Reconstruction: `{settings.get('reconstruct')}`, {settings.get('schedule')}, from "
        f"{settings.get('calibration_tokens', 0):,} calibration tokens.",
    ]
    lines[0] = lines[0][0].upper() + lines[0][1:]
    return lines
