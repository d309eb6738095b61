"""A job that several ranks share: what it can't do, and what each of them did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from liar_ext.bars import Clock
from liar_ext.calibration.passes import Passes
from liar_ext.errors import InputError
from liar_ext.plan import Plan
from liar_ext.ranks import Ranks
from liar_ext.recipe import Recipe
from liar_ext.reconstruction.one_pass import reconstruct_shared
from liar_ext.rows import SiteRow

# What a rank counts: sequences and tokens in passes over the calibration text, sequences in a walk,
# probes of sensitivities, sites that it solved. By blocks also READ, bytes of weights.
WORK = ("sequences", "tokens", "walked", "probes", "solved")
READ = "read"
Weights = dict[str, tuple[Tensor, Tensor | None]]


def check_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """Raise InputError for what several ranks can't share."""
    if recipe.of == "latency" and ranks.count > 1:
        raise InputError(
            "prune: of latency times the model, which all ranks would at once, and "
            f"{ranks.count} ranks share the job; leave it out, or run the job in one process"
        )


def solve_sites(
    passes: Passes, plan: Plan, settings: Mapping[str, object], clock: Clock
) -> tuple[Weights, list[SiteRow]]:
    """Solve the sites of a plan on the dense model's moments, each rank those that it owns."""
    found = {}
    for group in clock.each("calibrate", passes.back()):
        with clock("reconstruct"):
            found |= reconstruct_shared(
                passes.model, passes.bank, plan, group, passes.owners, **settings
            )  # a name for the bank would keep it while the next group's is summed
    return {name: found[name][0] for name in found}, [found[name][1] for name in plan.sites]


def work_of(ranks: Ranks, more: Sequence[str] = ()) -> dict[str, list[dict[str, int]]]:
    """Return what each rank has done, in their order; nothing where torchrun started none."""
    if not ranks.started:
        return {}
    return {"ranks": ranks.share({name: ranks.work[name] for name in (*WORK, *more)})}
