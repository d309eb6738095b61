"""What a job was asked for and what came of it, as its report shows it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from liar_ext.plan import Plan
from liar_ext.recipe import Recipe

ASKED = "criterion allocation reconstruct damp schedule keep_hidden seed"


def settings_of(
    recipe: Recipe,
    model: nn.Module,
    plan: Plan,
    source: Mapping[str, int],
    facts: Mapping[str, object],
) -> dict[str, object]:
    """Return the choices of a recipe, what they were made on, and other ``facts``."""
    return {
        **{name: getattr(recipe, name) for name in ASKED.split()},
        "kinds": list(recipe.kinds),
        "attn_unit": plan.attn_unit,
        "calibration_sequences": source["sequences"],
        "calibration_tokens": source["tokens"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ", ".join(
            sorted({str(each.device) for each in model.parameters() if not each.is_meta})
        ),
        "threads": torch.get_num_threads(),
        **facts,
    }
