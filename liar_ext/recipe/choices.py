"""What the fields of a recipe may be, and what the command says of them."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from liar_ext.recipe.checks import Check

DTYPES = ("float32", "bfloat16", "float16", "float64")
SCHEDULES = ("auto", "one-pass", "layerwise")
ALLOCATIONS = ("uniform", "global", "curve")
CRITERIA = ("fisher", "magnitude", "obs", "random", "snip", "taylor", "wanda", "wifv")  # built in
SELF_TEXT = 0.25  # of all sequences; docs/quality.md shows its effect
# The stages that fields belong to, in order: headings of the YAML and groups of the command's help.
GROUPS = {
    "model": "Model",
    "calibration": "Calibration",
    "budget": "Budget: how much stays",
    "selection": "Selection: which units stay",
    "reconstruction": "Reconstruction: error compensation in the weights that stay",
    "evaluation": "Evaluation",
}
# What docs/quality.md shows: the cheapest job that reconstructs, the default, the best.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"allocation": "uniform", "schedule": "one-pass", "self_text": 0.0},
    "balanced": {},
    "best": {"rescale": True},
}


def choice(default: Any, group: str, checker: Check, help: str, **more: Any) -> Any:
    """Return a field of the recipe, with what the command's option says of it."""
    facts = {"group": group, "check": checker, "help": help, **more}
    return field(default=default, metadata=facts)
