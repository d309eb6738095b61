"""What a job was asked for and what came of it, as its report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from liar_ext.models.running import device_of
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import DTYPES


def settings_of(
    recipe: Recipe,
    model: nn.Module,
    plan: Plan,
    source: Mapping[str, int],
    facts: Mapping[str, object],
) -> dict[str, object]:
    """Return what the recipe leaves open, what it was made on, and other ``facts``."""
    return {
        "schedule": recipe.schedule,
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


def as_run(recipe: Recipe, model: nn.Module, source: Mapping[str, int]) -> Recipe:
    """Return a recipe with what model and text were, where it doesn't say which they are."""
    changes: dict[str, object] = {"text_digests": {}}  # of batches there are no names
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype in DTYPES:
        changes["dtype"] = dtype
    if recipe.device != "auto":
        changes["device"] = str(device_of(model))
    if not recipe.calibration:  # the batches were drawn elsewhere
        count = max(source["sequences"], 2)
        changes |= {"samples": count, "self_text": 0.0, "random_tokens": 0.0}
        if recipe.of not in ("flops", "latency"):  # whose budgets are of another length
            changes["seq_len"] = max(source["tokens"] // count, 1)
    return replace(recipe, **changes)
