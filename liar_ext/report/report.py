"""The report of a job: every number a user needs to trust the result, and its text for people."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median_high
from typing import Any

import yaml

from liar_ext import ops
from liar_ext.checkpoint.folder import RECIPE_YAML, REPORT_JSON, REPORT_MARKDOWN
from liar_ext.models.plan import Plan, kind_of
from liar_ext.models.recipe import Recipe
from liar_ext.reconstruction.solve import SiteRow
from liar_ext.report import reading, sections, tables
from liar_ext.report.tables import Table, figure, plain, render
from liar_ext.system.environment import version_of
from liar_ext.system.errors import typed
from liar_ext.system.files import count, listing, text

MOST_SITES = 4096
REMOVED = {"blocks": "blocks", "attn": "attention heads", "mlp": "MLP channels"}
NAMES = {"attn": "attention", "mlp": "MLP"}
LOADER = re.compile(r"transformers\.(\w+)\.from_pretrained\(folder(, trust_remote_code=True)?\)")


@dataclass(repr=False)
class Report:
    """What was asked, what came out, what it cost.

    Parameters
    ----------
    model : str
        Name or path of the model.
    budget, settings, versions : dict
        As asked for, and with which software.
    sites, hidden : list of SiteRow
        One per site, and one per place where hidden features are read if their number was reduced.
    earlier : list of dict
        Of each job that had pruned the model before: ``budget``, and ``params`` before and after.
    grid : dict
        Steps of sizes and their cost, see :func:`liar_ext.selection.error_curves.rounding`.
    params : dict
        ``before``, ``after``, ``prunable_before``, ``prunable_after``.
    latency : dict
        For a budget of latency: ``dense_seconds``; the fraction of them that the plan takes,
        ``predicted`` and ``measured``, the latter with quartiles, before reconstruction and
        saving; ``table``, which :class:`liar_ext.measure.latency_table.LatencyTable` loads.
    evaluation : dict
        ``dense`` and ``pruned``, each with its numbers, when text was given to evaluate on.
    heal : dict
        Result of :func:`liar_ext.heal`. All other results are those before it.
    vocabulary : dict
        If tokens were removed: how many stay, which text decided, what that changed.
    seconds : dict
        By stage.
    warnings : list of str
        What a user has to know before trusting the result.
    loading : str
        Which loaders take the saved model.
    plan : Plan
        What stays; written to a file of its own, not into the report's JSON.
    recipe : Recipe
        Every choice of the job, to be repeated: ``liar prune --recipe liar/recipe.yaml``. A mapping
        if it was read from a file and is no whole recipe of this version.
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
    heal: dict = field(default_factory=dict)
    vocabulary: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    loading: str = ""
    plan: Plan | None = None
    recipe: Recipe | Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        known = [plain(self.model)]
        if self._params:
            known.append(f"{tables.arrow(',', *self._params)} parameters")
        for name, *both in tables.measures(self.evaluation):
            if name == "perplexity":
                known.append(f"perplexity {' → '.join(map(tables.quality, both))}")
        return f"Report({', '.join([*known, self._noted])})"

    def _repr_html_(self) -> str:
        """Return sizes, warnings and, folded, the sites, which a notebook shows."""
        return render("notebook.html", report=self, sites=sections.sites("Sites", self.sites))

    def to_frame(self) -> Any:
        """Return a pandas DataFrame with a row for each site, and the fields of its row."""
        import pandas

        names = [each.name for each in fields(SiteRow)]
        rows = [asdict(row) for row in self.sites]
        return pandas.DataFrame(rows, columns=names).set_index("name")

    @property
    def choices(self) -> Mapping[str, Any]:
        """Every choice of the recipe by its name; empty without one."""
        return self.recipe.to_dict() if isinstance(self.recipe, Recipe) else self.recipe or {}

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds: numbers to six digits, an infinity as ``"inf"``."""
        found = {key: value for key, value in vars(self).items() if key not in ("plan", "recipe")}
        for name in ("sites", "hidden"):
            found[name] = [asdict(row) for row in found[name]]
        return {**_strict(found), "recipe": dict(self.choices) or None}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Report:
        """Read what :meth:`to_dict` gave, or a stranger has written.

        What is missing, or no value of its kind, is None or left out, and so is a section that
        can't be shown. More than 4,096 sites are cut, and a warning says so.
        """
        read = {name: reader(facts.get(name)) for name, reader in reading.PARTS.items()}
        for name in ("earlier", "evaluation", "grid", "heal", "latency", "vocabulary"):
            try:
                alone = cls("", **{name: read[name]})
                alone.to_markdown(), alone.to_card(), alone.summary()
            except reading.MISFIT:
                read[name] = type(read[name])()
        for name in ("sites", "hidden"):
            found = listing(facts.get(name))
            read[name] = [reading.row(each) for each in found[:MOST_SITES]]
            if len(found) > MOST_SITES:
                cut = f"Of {len(found):,} {name} the first {MOST_SITES:,} are shown."
                read["warnings"].append(cut)
        return cls(**read)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], operation: str = "report") -> Report:
        """Read the report of a saved folder, of this version or an older one.

        Raises
        ------
        InputError
            If the folder has none, or it is no JSON object that can be read.
        """
        return cls.from_dict(reading.read_report(folder, operation))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the report, ``liar/report.json`` and ``.md``, and the recipe into ``folder``."""
        folder = Path(folder)
        (folder / REPORT_JSON).parent.mkdir(exist_ok=True)
        (folder / REPORT_JSON).write_text(self.to_json() + "\n", encoding="utf-8")
        (folder / REPORT_MARKDOWN).write_text(self.to_markdown(), encoding="utf-8")
        if isinstance(self.recipe, Recipe):
            self.recipe.save(folder / RECIPE_YAML)

    def sizes(self) -> Table:
        """Return what the model was and is."""
        return sections.sizes(self.params, self.evaluation, self.latency, self.dtype)

    @property
    def _params(self) -> tuple[int, int] | None:
        before, after = self.params.get("before"), self.params.get("after")
        return (before, after) if before and after is not None else None

    @property
    def _noted(self) -> str:
        return f"{len(self.warnings)} warning{'s' * (len(self.warnings) != 1)}"

    @property
    def loader(self) -> tuple[str, str] | None:
        """The class of transformers that loads the folder, and what follows the folder's name."""
        found = LOADER.search(self.loading)
        return found and (found[1], found[2] or "")

    @property
    def dtype(self) -> str:
        """The data type of the weights; empty if it isn't known."""
        return text(self.settings.get("dtype") or self.choices.get("dtype"))

    def verdict(self) -> Table:
        """Return in words what was removed, what that cost, and what needs attention."""
        quality, notes = tables.cost(self.evaluation), len(self.warnings)
        short = [f"{1 - self._params[1] / self._params[0]:.0%} smaller"] if self._params else []
        warnings = self._noted if notes else "no warnings"
        short += [quality or "quality not measured", warnings]
        rows, worst = [("removed", self._removed())], self.worst_layer()
        if worst is not None:
            layer, _, kind = worst.name.partition(".")
            name = f"{NAMES[kind]} of layer {layer}" if kind in NAMES else worst.name
            errors = [row.holdout_error for row in self._layers]
            said = (
                f"{name} keeps {worst.units_after:,} of {worst.units_before:,} units. Its relative "
                f"error on held-out text is {worst.holdout_error:.1%}{_beside(worst)}; the median "
                f"layer has {median_high(each for each in errors if each is not None):.1%}."
            )
            rows.append(("worst layer", said))
        todo = ["measure the quality: errors of layers don't show it"] * (not quality)
        todo += [f"read the {warnings} below"] * (notes > 0)
        rows.append(("needs attention", "; ".join(todo) or "nothing"))
        return Table("In short", ("", ""), rows, (0, 1), f"{', '.join(short).capitalize()}.")

    def _removed(self) -> str:
        found = []
        for kind, words in REMOVED.items():
            rows = [row for row in self.sites if kind_of(row.name) == kind]
            lost = sum(row.units_before - row.units_after for row in rows if row.is_pruned)
            if lost:
                share = lost / sum(row.units_before or 0 for row in rows)
                found.append(f"{share:.0%} of the {words}")
        found += ["hidden features"] * bool(self.hidden)
        before, after = (self.vocabulary.get(when) for when in ("before", "after"))
        found += [f"{1 - after / before:.0%} of the tokens"] if after != before else []
        return " and ".join(found) or "nothing"

    def tables(self) -> list[Table]:
        """Return all other tables, in the order of a page."""
        parts = (
            (sections.healing, self.heal),
            (sections.vocabulary, self.vocabulary),
            (sections.vocabulary_sizes, self.vocabulary.get("auto")),
            (sections.latency, self.latency),
            (sections.grid, self.grid),
        )
        found = [table(part) for table, part in parts if part]
        rows = {"Sites": self.sites, "Hidden features": self.hidden}
        found += [sections.sites(title, some) for title, some in rows.items() if some]
        choices, settings = self.choices, self.settings
        if choices:
            what = "the job, but for the healing," if self.heal else "the job"
            repeat = f"Repeat {what} by `liar prune --recipe {RECIPE_YAML} --out DIR`."
            found.append(sections.facts("Recipe", choices, repeat))
            settings = {key: value for key, value in settings.items() if key not in choices}
        else:
            found.append(sections.facts("Budget", self.budget))
        jobs = {f"job {at}": sections.earlier_job(job) for at, job in enumerate(self.earlier, 1)}
        found += [
            sections.facts("Found" if choices else "Settings", settings),
            sections.facts("Pruned before", jobs),
            sections.facts("Seconds", {key: figure(s, ".1f") for key, s in self.seconds.items()}),
            sections.facts("Versions", self.versions),
        ]
        return [table for table in found if table.rows]

    def to_markdown(self) -> str:
        """Return the report as Markdown for a person."""
        return render("report.md", report=self)

    @property
    def _layers(self) -> list[SiteRow]:
        """Rows of layers that lost something."""
        return [row for row in self.sites if row.is_pruned and row.name != "blocks"]

    def worst_layer(self, error: str = "holdout_error") -> SiteRow | None:
        """Return the pruned site whose error of that name is the largest, if one has it."""
        known = [row for row in self._layers if getattr(row, error) is not None]
        return max(known, key=lambda row: getattr(row, error), default=None)

    def lines(self) -> list[str]:
        """Return what came out in a few lines of text: sizes, quality, errors."""
        lines = [f"Pruned before: {sections.earlier_job(job)}" for job in self.earlier]
        for title, part in sections.SIZES.items():
            before, after = self.params.get(f"{part}before"), self.params.get(f"{part}after")
            if before and after is not None:
                lines.append(f"{title:20} {before:>15,} → {after:>15,}  ({after / before:.1%})")
        for row in self.sites:
            if row.name == "blocks" and row.is_pruned:
                sizes = f"{row.units_before:>15} → {row.units_after:>15}"
                lines.append(f"{'blocks':20} {sizes}  ({row.path})")
        for name, *numbers in tables.measures(self.evaluation):
            before, after = map(tables.quality, numbers)
            on = tables.measured_on(self.evaluation["dense"])
            lines.append(f"{name:20} {before:>15} → {after:>15}  ({on})")
        certified = self.evaluation.get("certified")
        if certified:
            lines.append(
                f"{'certified divergence':20} {figure(certified['divergence']):>15} from the dense "
                f"model, over {figure(certified.get('rows'), ',')} outputs that no decision has "
                "seen"
            )
        parts = {
            "latency": sections.latency_lines(self.latency),
            "schedule": sections.schedule_lines(self.settings),
            "sizes": sections.grid_lines(self.grid),
            "vocabulary": sections.vocabulary_lines(self.vocabulary),
            "healing": sections.healing_lines(self.heal),
        }
        lines += [f"{title:20} {line}" for title, part in parts.items() for line in part]
        if (worst := self.worst_layer()) is not None:
            error = f"{worst.holdout_error:.1%} relative error on held-out text{_beside(worst)}"
            lines.append(f"{'worst layer':20} {worst.name}: {error}")
        if (worst := self.worst_layer("certified_error")) is not None:
            error = f"{worst.certified_error:.1%} (certified){_beside(worst)}"
            lines.append(f"{'':20} {worst.name}: {error}")
        return lines

    def summary(self) -> str:
        """Return :meth:`lines`, how to load the model, and warnings, as text."""
        lines = [*self.lines(), *([self.loading] if self.loading else [])]
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])

    def dense_beside(self, folder: str | os.PathLike[str]) -> str:
        """Return the dense model as it is typed; MODEL if it has no name, or the folder's own."""
        known = self.model and not is_same_place(self.model, folder)
        return typed(self.model) if known else "MODEL"

    def to_card(self, license_name: str | None = None) -> str:
        """Return a model card, README.md of a folder, with the metadata that model hubs read."""
        path = Path(self.model)
        library = "diffusers" if "diffusers." in self.loading else "transformers"
        front = {
            "library_name": library,
            **({} if path.is_absolute() or os.path.exists(path) else {"base_model": self.model}),
            **({"license": license_name} if license_name else {}),
            "tags": ["pruned", "structured-pruning", "liar"],
        }
        known, healed = {**self.choices, **self.settings}, sections.healing_lines(self.heal)
        return render(
            "card.md",
            report=self,
            verifies=library == "transformers",
            front=yaml.safe_dump(front, sort_keys=False).strip(),
            name=path.name or self.model,
            known=known,
            tokens=count(known.get("calibration_tokens")) or 0,
            vocabulary=" ".join(sections.vocabulary_lines(self.vocabulary)),
            healed=" ".join(["Healed after that.", *healed, sections.APART]) if healed else "",
        )


def is_same_place(model: str, folder: str | os.PathLike[str]) -> bool:
    """Tell whether a model, by its name or path, is a folder itself, as if pruned in place."""
    return os.path.realpath(model) == os.path.realpath(folder)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the kernels in use."""
    packages = ("liar_ext", "torch", "transformers", "safetensors", "numpy")
    return {
        **{package: str(version_of(package)) for package in packages},
        "python": platform.python_version(),
        **{f"liar_ext.{key}": str(value) for key, value in ops.build_info().items()},
    }


def _strict(value: object) -> object:
    """Round to six digits; replace infinities and NaN, which JSON lacks, by their names."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _beside(row: SiteRow) -> str:
    """Return what an error counts beside the layer's own, so that it may be above 100 %."""
    return ", with what earlier layers lost" if row.target == "stream" else ""
