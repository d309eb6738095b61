"""What jobs on one model and one calibration set share: scores, error curves, sensitivities.

Each is kept by site, under a key of every field of the recipe that it depends on. So a job finds
what it would have computed itself, bit for bit, and the others what they lack.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from liar_ext.calibration.moments import MomentBank
from liar_ext.models.sites import Site
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import recipe_fields

SENSITIVITY = "sensitivity"
Value = TypeVar("Value")


@dataclass
class Known:
    """What has been found for one dense model, its moments and their text.

    Parameters
    ----------
    found : dict
        Values by what they are, key and site.
    spared : float
        CPU seconds that were not spent anew.
    probe_keep : float or None
        Fraction of a site that stays while its sensitivity is measured; None: the budget's.
    """

    found: dict[tuple, tuple[Any, float]] = field(default_factory=dict)
    spared: float = 0.0
    probe_keep: float | None = None

    @classmethod
    def of_bank(cls, bank: MomentBank | None, probe_keep: float | None = None) -> Known:
        """Return the sensitivities that a bank has."""
        known = cls(probe_keep=probe_keep)
        for each in [] if bank is None else bank.source.get("sensitivities", ()):
            for name, value in each["sites"].items():
                known.found[SENSITIVITY, each["key"], name] = value, 0.0
        return known

    def get(
        self,
        what: str,
        key: str,
        at: Sequence[Site],
        compute: Callable[[Sequence[Site]], Mapping[str, Value]],
    ) -> dict[str, Value]:
        """Return the values of sites by name; ``compute`` gives those that aren't there."""
        missing = [site for site in at if not self.has(what, key, [site])]
        self.spared += sum(self.found.get((what, key, place(site)), (0, 0.0))[1] for site in at)
        if missing:
            start = time.process_time()
            values = compute(missing)
            each = (time.process_time() - start) / len(missing)
            for site in missing:
                self.found[what, key, place(site)] = values[site.name], each
        return {site.name: self.found[what, key, place(site)][0] for site in at}

    def has(self, what: str, key: str, at: Sequence[Site]) -> bool:
        """Tell whether the values of all sites are there."""
        return all((what, key, place(site)) in self.found for site in at)

    def store_sensitivities(self, bank: MomentBank) -> None:
        """Put the sensitivities that were measured into a bank, for jobs to come."""
        by_key: dict[str, dict[str, float]] = {}
        for (what, key, name), (value, _) in self.found.items():
            if what == SENSITIVITY:
                by_key.setdefault(key, {})[name] = value
        bank.source["sensitivities"] = [
            {"key": key, "sites": sites} for key, sites in by_key.items()
        ]


def place(site: Site) -> str:
    """Return what a value is of: a site with its units."""
    return f"{site.name} {site.unit} {site.units} {site.groups}"


def score_key(recipe: Recipe) -> str:
    """Return what scores and error curves depend on, beside the site."""
    per = "feature" if recipe.allocation == "global" else "unit"
    chosen = {each.name: getattr(recipe, each.name) for each in recipe_fields(affects="scores")}
    return json.dumps({**chosen, "per": per, "liar_ext": version("liar_ext")}, sort_keys=True)


def sensitivity_key(recipe: Recipe, keep: float, form: str) -> str:
    """Return what sensitivities depend on, beside the site; ``form`` is that of the new weights."""
    more = {"keep": keep, "form": form}
    return json.dumps({**json.loads(score_key(recipe)), **more}, sort_keys=True)
