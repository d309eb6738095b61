"""The report of a job: every number a user needs to trust the result."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from liar_ext import ops
from liar_ext.plan import Plan
from liar_ext.report import markdown
from liar_ext.report.card import card
from liar_ext.report.rows import BY_BLOCKS, ON_HOST, SiteRow

REPORT_JSON = "liar/report.json"
REPORT_MARKDOWN = "liar/report.md"
RECIPE_YAML = "liar/recipe.yaml"
NO_ERROR = 1e-6  # a relative error that no site of a real model has


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
    earlier : list of dict
        Of each job that had pruned the model before: ``budget``, and ``params`` before and after.
    grid : dict
        The steps that sizes are counted in, and what that costs against single units; see
        :func:`liar_ext.selection.rounding.rounding`.
    params : dict
        ``before``, ``after``, ``prunable_before``, ``prunable_after``.
    latency : dict
        For a budget of latency: ``dense_seconds``; the fraction of them that the plan takes,
        ``predicted`` and ``measured``, the latter with quartiles, before reconstruction and
        saving; ``table``, which :class:`liar_ext.report.latency.LatencyTable` loads.
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
    recipe : Recipe
        Every choice of the job, to be repeated: ``liar prune --recipe liar/recipe.yaml``.
    """

    model: str
    budget: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    sites: list[SiteRow] = field(default_factory=list)
    hidden: list[SiteRow] = field(default_factory=list)
    earlier: list[dict] = field(default_factory=list)
    grid: dict = field(default_factory=dict)
    params: dict = field(default_factory=dict)
    latency: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    loading: str = ""
    plan: Plan | None = None
    recipe: Any = None  # a Recipe, which stands on a higher layer

    def summary(self) -> str:
        """Return what came out in a few lines of text."""
        return "\n".join(markdown.summary(self))

    def to_json(self) -> str:
        """Return the report as strict JSON, numbers to six digits; an infinity is ``"inf"``."""
        facts = {key: value for key, value in vars(self).items() if key not in ("plan", "recipe")}
        for name in ("sites", "hidden"):
            facts[name] = [asdict(row) for row in facts[name]]
        facts = _strict(facts)
        facts["recipe"] = None if self.recipe is None else self.recipe.to_dict()
        return json.dumps(facts, indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """Return the report as Markdown for a person."""
        return "\n".join(markdown.page(self)) + "\n"

    def to_card(self, license_name: str | None = None) -> str:
        """Return the report as a model card, the README.md of a folder."""
        return card(self, license_name)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the report, ``liar/report.json`` and ``.md``, and the recipe into ``folder``."""
        folder = Path(folder)
        (folder / REPORT_JSON).parent.mkdir(exist_ok=True)
        (folder / REPORT_JSON).write_text(self.to_json() + "\n", encoding="utf-8")
        (folder / REPORT_MARKDOWN).write_text(self.to_markdown(), encoding="utf-8")
        if self.recipe is not None:
            self.recipe.save(folder / RECIPE_YAML)


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
        How the pruned units were reconstructed.
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
    unknown = [row.name for row in rows if not math.isfinite(row.error + row.holdout_error)]
    if unknown:
        warnings.append(
            f"The errors of {', '.join(unknown[:8])} ({len(unknown)} sites) are not finite and say "
            "nothing; load the model in a wider dtype."
        )
    pruned = [row for row in rows if row.units_after < row.units_before]
    if pruned and all(row.error < NO_ERROR and row.holdout_error < NO_ERROR for row in pruned):
        warnings.append(
            "Every error is 0: the activations do not vary over the calibration text, or the "
            "removed units did nothing. Give other text, and look at the model's weights."
        )
    given_up = [row.name for row in pruned if math.isinf(row.damp)]
    if mode not in ("none", "bias") and given_up:
        warnings.append(
            "The cross-validated error is least with plain dropping at "
            f"{_first(given_up)} ({len(given_up)} sites): give more calibration text."
        )
    starved = [row for row in rows if row.tokens is not None and row.tokens < row.units_before]
    if starved:
        names = [f"{row.name} ({row.tokens})" for row in starved]
        warnings.append(
            "Fewer calibration tokens than the expert has channels reached "
            f"{_first(names)} ({len(names)} experts): "
            "their channels are chosen, and compensated for, by little or nothing; give more "
            "calibration text."
        )
    moved = [row.name for row in rows if row.path.endswith(ON_HOST)]
    if moved:
        warnings.append(
            f"The GPU had no memory to solve {_first(moved)} ({len(moved)} sites), so the CPU did."
        )
    cramped = [row.name for row in rows if BY_BLOCKS in row.path]
    if cramped:
        warnings.append(
            f"An allocation failed in the solve of {_first(cramped)} ({len(cramped)} sites), so it "
            "was done by blocks, in a file, more slowly: give more memory."
        )
    if any(row.target != "dense-input" for row in pruned):
        warnings.append(
            "Layerwise errors count what the layers before have lost, on text that those were "
            "solved for: fresh text can show several times as much. Judge the model by --eval, "
            "--certify or its own task."
        )
    if tokens < 2 * widest:
        warnings.append(
            f"{tokens} calibration tokens are few for sites of {widest} features; "
            "the cross-validated errors say what that costs."
        )
    return warnings


def _first(names: Sequence[str]) -> str:
    """Return eight names at most."""
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _strict(value: object) -> object:
    """Round to six digits; replace infinities and NaN, which JSON lacks, by their names."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
