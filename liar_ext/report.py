"""The report of a job: every number a user needs to trust the result."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from liar_ext import ops
from liar_ext.plan import Plan

REPORT_JSON = "liar_report.json"
REPORT_MARKDOWN = "liar_report.md"
Step = TypeVar("Step")


@dataclass(frozen=True)
class SiteRow:
    """What happened at one site.

    Errors are relative to ``tr(W G Wᵀ)``, the energy of the consumer's output; ``damp`` is λ, with
    infinity for plain dropping; ``condition`` is a lower bound on that of the solved matrix.
    ``target`` is what errors are measured to, and ``share`` how far towards it, from the site's own
    dense weight on its input, the solve was taken.
    ``sensitivity`` is what the model's output loses per unit of relative error of the site, in
    nats; None where it was not measured.
    """

    name: str
    units_before: int
    units_after: int
    params_before: int
    params_after: int
    damp: float
    error: float
    holdout_error: float
    condition: float
    dropped_rows: int
    path: str
    seconds: float
    target: str = "dense-input"
    share: float = 0.0
    sensitivity: float | None = None


@dataclass
class Report:
    """What was asked, what came out, what it cost.

    Parameters
    ----------
    model : str
        Name or path of the model.
    budget, settings, versions : dict
        As asked for, and with which software.
    sites : list of SiteRow
        One per site.
    hidden : list of SiteRow
        One per place where hidden features are read, if the hidden size was pruned.
    params : dict
        ``before``, ``after``, ``prunable_before``, ``prunable_after``.
    evaluation : dict
        ``dense`` and ``pruned``, each with its numbers, when text was given to evaluate on.
    seconds : dict
        By stage.
    warnings : list of str
        What a user has to know before trusting the result.
    loading : str
        Which loaders take the saved model.
    plan : Plan
        What stays; written to a file of its own, not into the report's JSON.
    """

    model: str
    budget: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    sites: list[SiteRow] = field(default_factory=list)
    hidden: list[SiteRow] = field(default_factory=list)
    params: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    loading: str = ""
    plan: Plan | None = None

    def to_json(self) -> str:
        """Return the report as strict JSON; an infinite number is the string ``"inf"``."""
        facts = {key: value for key, value in vars(self).items() if key != "plan"}
        for name in ("sites", "hidden"):
            facts[name] = [asdict(row) for row in facts[name]]
        return json.dumps(_strict(facts), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """Return the report as Markdown for a person."""
        lines = [f"# Pruning report: {self.model}", ""]
        lines += _summary(self)
        if self.loading:
            lines += ["", self.loading]
        if self.warnings:
            lines += ["", "## Warnings", "", *(f"- {warning}" for warning in self.warnings)]
        for title, rows in (("Sites", self.sites), ("Hidden features", self.hidden)):
            if rows:
                lines += ["", f"## {title}", "", *_table(rows)]
        for title, facts in (
            ("Budget", self.budget),
            ("Settings", self.settings),
            ("Seconds", {key: f"{value:.1f}" for key, value in self.seconds.items()}),
            ("Versions", self.versions),
        ):
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {value} |" for key, value in facts.items()]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``liar_report.json`` and ``liar_report.md`` into ``folder``."""
        Path(folder, REPORT_JSON).write_text(self.to_json() + "\n", encoding="utf-8")
        Path(folder, REPORT_MARKDOWN).write_text(self.to_markdown(), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the kernels in use."""
    packages = ("liar_ext", "torch", "transformers", "safetensors", "numpy")
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        **{f"liar_ext.{key}": str(value) for key, value in ops.build_info().items()},
    }


def what_to_know(rows: Sequence[SiteRow], mode: str, tokens: int, widest: int) -> list[str]:
    """Return what a user has to know before trusting the result.

    Parameters
    ----------
    rows : sequence of SiteRow
        What happened at the sites.
    mode : str
        What was put back.
    tokens : int
        Calibration tokens.
    widest : int
        Features of the widest site.
    """
    warnings = []
    dropped = max((row.dropped_rows for row in rows), default=0)
    if dropped:
        warnings.append(
            f"Up to {dropped} token rows per site held a non-finite value and were left out; "
            "calibrate in a wider dtype."
        )
    pruned = [row for row in rows if row.units_after < row.units_before]
    given_up = [row.name for row in pruned if math.isinf(row.damp)]
    if mode not in ("none", "bias") and given_up:
        warnings.append(
            "Held-out text is served best by plain dropping at "
            f"{', '.join(given_up[:8])}{' ...' if len(given_up) > 8 else ''} "
            f"({len(given_up)} sites): give more calibration text."
        )
    if any(row.target != "dense-input" for row in pruned):
        warnings.append(
            "Layerwise errors count what the layers before have lost, on text that those were "
            "solved for: fresh text can show several times as much. Judge the model by --eval."
        )
    if tokens < 2 * widest:
        warnings.append(
            f"{tokens} calibration tokens are few for sites of {widest} features; "
            "the held-out errors say what that costs."
        )
    return warnings


def _table(rows: Sequence[SiteRow]) -> list[str]:
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


def _summary(report: Report) -> list[str]:
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


def _strict(value: object) -> object:
    """Replace infinities and NaN, which JSON lacks, by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class Clock:
    """Seconds by stage; stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the seconds of the context for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def each(self, stage: str, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the steps; what getting them takes is of the stage."""
        steps, step = iter(steps), None
        while True:
            with self(stage):
                step = next(steps, None)
            if step is None:
                return
            yield step
