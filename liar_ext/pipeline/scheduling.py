"""What a model makes a job leave as it is, or do otherwise; found before it runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from liar_ext.calibration.taps import is_relative
from liar_ext.models.sites import Site, why_whole
from liar_ext.recipe import Recipe

NO_GAIN = (
    "a norm reads what each gives, and there a walk gains nothing; "
    "--schedule layerwise walks anyway"
)


def settled_for(asked: Recipe, at: Sequence[Site]) -> Recipe:
    """Return a recipe with what ``schedule="auto"`` stands for where no text is left to measure by.

    One pass where a norm reads what their consumers give: of Gemma-3 it is better in all pairs that
    were measured, in two thirds of the time (docs/quality.md). Else :meth:`Recipe.settled`.
    """
    settled = asked.settled()
    if asked.schedule != "auto" or not any(map(is_relative, at)):
        return settled
    return replace(settled, schedule="one-pass")


def warn_of_what_stays(model: nn.Module, kinds: Sequence[str], at: Sequence[Site]) -> None:
    """Say which kinds of sites are asked for and can't lose a unit."""
    for kind in kinds:
        some, reason = [site for site in at if site.kind == kind], why_whole(model, kind)
        if some and all(site.unit == "kv_group" and site.units == 1 for site in some):
            reason = "all its query heads share one key and value; give attn_unit='head'"
        if reason:
            message = f"prune: {kind} of {model.config.model_type} stays whole: {reason}"
            warnings.warn(message, stacklevel=4)
