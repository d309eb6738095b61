"""A job that several ranks share: what it can't do, and what each of them did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from liar_ext.calibration.passes import Passes
from liar_ext.errors import InputError
from liar_ext.models.sites import Site
from liar_ext.plan import Plan
from liar_ext.ranks import Ranks
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.one_pass import reconstruct
from liar_ext.report.clock import Clock
from liar_ext.report.rows import SiteRow

# What a rank counts: sequences and tokens in passes over the calibration text, sequences in a walk,
# probes of sensitivities, sites that it solved. By blocks also READ, bytes of weights.
WORK = ("sequences", "tokens", "walked", "probes", "solved")
READ = "read"
Weights = dict[str, tuple[Tensor, Tensor | None]]


def check_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """Raise InputError for what several ranks can't share."""
    refused = {
        "of latency": (recipe.of == "latency", "times the model, which all ranks would at once"),
    }
    for choice, (given, does) in refused.items():
        if given and ranks.count > 1:
            raise InputError(
                f"prune: {choice} {does}, and {ranks.count} ranks share the job; leave it out, or "
                "run the job in one process"
            )


def solve_sites(
    passes: Passes, plan: Plan, settings: Mapping[str, object], clock: Clock
) -> tuple[Weights, list[SiteRow]]:
    """Solve the sites of a plan on the dense model's moments, each rank those that it owns."""
    found = {}
    for group in clock.each("calibrate", passes.back()):
        with clock("reconstruct"):
            found |= solve_group(passes, group, plan, settings)
    return {name: found[name][0] for name in found}, [found[name][1] for name in plan.sites]


def solve_group(
    passes: Any, group: Sequence[Site], plan: Plan, settings: Mapping[str, object]
) -> dict[str, tuple[tuple[Tensor, Tensor | None], SiteRow]]:
    """Return weights and rows of the sites that ``passes`` have given, each solved by its owner."""
    ranks = passes.owners.ranks

    def solve(mine: Sequence[Site]) -> dict[str, tuple]:
        here = replace(plan, sites={site.name: plan.sites[site.name] for site in mine})
        ranks.work["solved"] += len(mine)
        weights, rows = reconstruct(passes.model, passes.bank, here, **settings)
        return {row.name: (weights[row.name], row) for row in rows}

    return passes.owners.together(group, solve)


def work_of(ranks: Ranks, more: Sequence[str] = ()) -> dict[str, list[dict[str, int]]]:
    """Return what each rank has done, in their order; nothing where torchrun started none."""
    if not ranks.started:
        return {}
    return {"ranks": ranks.share({name: ranks.work[name] for name in (*WORK, *more)})}
