"""What a job was asked for and what came of it, as its report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from liar_ext.checkpoint import stock_config
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.models.running import device_of
from liar_ext.pipeline.analysis import Base, Decision
from liar_ext.pipeline.choosing import Solved
from liar_ext.pipeline.job import Job
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import DTYPES
from liar_ext.report.report import Report, versions
from liar_ext.rows import what_to_know


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


def describe_sizes(job: Job) -> None:
    """Let the config of a sliced model say its new sizes, and where they come from."""
    done = {"params": [job.params["before"], count_params(job.model)]}
    stock_config.describe(job.model, {"budget": job.recipe.budget.to_dict(), **done})


def report_of(job: Job, base: Base, decision: Decision, solved: Solved) -> Report:
    """Return every number that a user needs to trust the result."""
    model, recipe, plan, rows, speed = (
        job.model,
        job.recipe,
        solved.plan,
        solved.rows,
        decision.speed,
    )
    settled = replace(recipe, schedule=solved.schedule)
    hidden_rows = base.narrowing.rows if base.narrowing else []
    facts, grid = {**decision.facts, **solved.facts}, dict(decision.grid)
    if base.narrowing is not None:
        facts["narrow_passes"] = base.source["passes"]
        grid |= {"tile": recipe.tile, "hidden": base.narrowing.grid}
    left = sum(r.params_after for r in rows) if rows else sum(site.params for site in base.at)
    # What was measured is measured again where the recipe is.
    asked = recipe if job.judged is None else replace(recipe, schedule="auto")
    evaluation = {"dense": solved.dense, "pruned": solved.pruned}
    evaluation = {} if None in evaluation.values() else evaluation
    evaluation |= {} if solved.certified is None else {"certified": solved.certified}
    widest = max(site.d_in for site in base.at)
    known = [*rows, *hidden_rows], recipe.reconstruct, solved.source["tokens"], widest
    said = [*job.notes, *decision.notes, *solved.notes, *grid.get("warnings", [])]
    return Report(
        model=recipe.model or model.config.name_or_path or type(model).__name__,
        plan=plan,
        recipe=as_run(asked, model, solved.source),
        budget=recipe.budget.to_dict(),
        earlier=list(job.earlier),
        settings=settings_of(settled, model, plan, solved.source, facts),
        versions=versions(),
        sites=(base.experts.rows if base.experts else [])
        + [replace(row, sensitivity=decision.sensitivities.get(row.name)) for row in rows],
        hidden=hidden_rows,
        grid=grid,
        params={**job.params, "prunable_after": left, "after": count_params(model)},
        latency={} if speed is None else speed.facts(),
        evaluation=evaluation,
        seconds=job.clock.seconds,
        warnings=(what_to_know(*known) if any(known[0]) else [])
        + said
        + ([] if speed is None else speed.warnings()),
        loading=stock_config.how_to_load(model, plan),
    )
