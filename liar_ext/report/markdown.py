"""The report as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from liar_ext.report.rows import SiteRow

if TYPE_CHECKING:
    from liar_ext.report.report import Report


def site_table(rows: Sequence[SiteRow]) -> list[str]:
    """Return the lines of a table of sites, or of places where hidden features are read."""
    lines = [
        "Errors are relative to the energy of the dense output; *held-out* is solved on one half "
        "of the calibration documents and measured on the other.",
        "",
        "| site | units | parameters | damp | error | held-out | condition | dropped rows "
        "| path | target | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row.name} | {row.units_before} → {row.units_after} "
        f"| {row.params_before:,} → {row.params_after:,} | {row.damp:.0e} "
        f"| {row.error:.4f} | {row.holdout_error:.4f} | {row.condition:.1e} "
        f"| {row.dropped_rows} | {row.path} | {_target(row)} | {row.seconds:.2f} |"
        for row in rows
    ]


def _target(row: SiteRow) -> str:
    return f"{row.share:.2f} {row.target}" if row.share else "dense-input"


def summary(report: Report) -> list[str]:
    """Return the lines of a table of what the model was and is."""
    lines = ["| | dense | pruned | pruned / dense |", "|---|---|---|---|"]
    params = report.params
    for title, before, after in (
        ("parameters", "before", "after"),
        ("prunable parameters", "prunable_before", "prunable_after"),
    ):
        if params.get(before):
            ratio = params[after] / params[before]
            lines.append(f"| {title} | {params[before]:,} | {params[after]:,} | {ratio:.3f} |")
    dense, pruned = report.evaluation.get("dense"), report.evaluation.get("pruned")
    if dense and pruned:
        ratio = pruned["perplexity"] / dense["perplexity"]
        lines.append(
            f"| perplexity, {dense['tokens']:,} tokens in windows of {dense['seq_len']} "
            f"| {dense['perplexity']:.2f} | {pruned['perplexity']:.2f} | {ratio:.3f} |"
        )
    return lines
