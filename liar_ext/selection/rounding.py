"""Rounding: the grids that the sizes of sites lie on, and what they cost against single units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from liar_ext.models.sites import Site
from liar_ext.plan import AUTO_TILE, LEAST_STEPS, Budget, Plan
from liar_ext.selection.allocation import allocate, allowed_counts, site_step
from liar_ext.selection.costs import Costs
from liar_ext.selection.curve_allocation import predict_divergence

OBJECTIVES = {
    "curve": "predicted divergence from the dense model, nats per token, by held-out error curves",
    "global": "none that is a loss: it keeps the highest standardised scores, a tile at a time",
    "uniform": "none that is a loss: it keeps the same fraction everywhere, as near as tiles allow",
}


def rounding(
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    method: str,
    plan: Plan,
    *,
    costs: Costs | None = None,
    losses: Mapping[str, Tensor] | None = None,
) -> dict[str, object]:
    """Return the grid of every kind of site, and what an allocation loses by it.

    The budget is allocated once more with a tile of 1, by the same scores and losses. As the
    counts of a grid are some of those, the loss at tile 1 is the least of both allocations': the
    second is one that an approximate search may have missed.

    Parameters
    ----------
    at, scores, budget, method, costs, losses
        As for :func:`liar_ext.allocate`.
    plan : Plan
        What was decided.

    Returns
    -------
    dict
        ``tile`` as asked for; ``sites``, a row per kind and size; ``kept`` and
        ``kept_at_tile_1``, fractions of the budget's cost; ``objective`` in words; for ``curve``
        ``predicted_divergence`` and ``predicted_divergence_at_tile_1``; ``notes`` on layers that
        the grid does not suit, and ``warnings`` of those that it keeps from being pruned.
    """
    rows = [_row(some, budget, plan) for some in _kinds(at)]
    facts = {"tile": budget.tile, "sites": rows, "objective": OBJECTIVES[method]}
    costs = costs or Costs.of(at, budget)
    facts["kept"] = facts["kept_at_tile_1"] = costs.kept_fraction(plan)
    settings = {"costs": costs, "losses": losses}
    on_grid = finer = allocate(at, scores, budget, method, **settings)
    single = replace(budget, tile=1)
    if any(site_step(site, budget) != site_step(site, single) for site in at):
        finer = allocate(at, scores, single, method, **settings)
        facts["kept_at_tile_1"] = costs.kept_fraction(finer)
    if method == "curve":
        found = [predict_divergence(losses, each) for each in (on_grid, finer)]
        facts["predicted_divergence"] = found[0]
        facts["predicted_divergence_at_tile_1"] = min(found)
    channels = [row for row in rows if row["unit"] == "channel"]
    facts["notes"] = [note for row in channels for note in _notes(row, budget)]
    facts["warnings"] = [
        f"{row['layers']} {row['kind']} layers keep all of their {row['units']} channels, since "
        f"tile={budget.tile} allows no smaller number; lower it to prune these layers."
        for row in channels
        if row["counts"] == 1 and budget.keep < 1.0
    ]
    return facts


def _kinds(at: Sequence[Site]) -> list[list[Site]]:
    """Return the sites by unit and number of units, experts apart."""
    groups: dict[tuple[str, int, bool], list[Site]] = {}
    for site in at:
        groups.setdefault((site.unit, site.units, site.expert is None), []).append(site)
    return list(groups.values())


def _row(some: Sequence[Site], budget: Budget, plan: Plan) -> dict[str, object]:
    """Return what the grid of equal sites is, and what they keep."""
    site = some[0]
    kept = [len(plan.sites[each.name].kept) for each in some]
    return {
        "kind": site.kind if site.expert is None else "expert",
        "unit": site.unit,
        "layers": len(some),
        "units": site.units,
        "step": site_step(site, budget),
        "counts": len(allowed_counts(site, budget)),
        "least_kept": min(kept),
        "most_kept": max(kept),
    }


def _notes(row: Mapping[str, object], budget: Budget) -> list[str]:
    """Return what a grid does not do for sites of a size."""
    units, step, layers = row["units"], row["step"], f"{row['layers']} {row['kind']} layers"
    notes = []
    if budget.tile == "auto" and step < AUTO_TILE:
        notes.append(
            f"{layers} have {units} channels, fewer than {LEAST_STEPS} tiles of {AUTO_TILE}: they "
            f"are counted in steps of {step}."
        )
    if units % step and row["most_kept"] == units:
        notes.append(
            f"Of {layers} some keep all of their {units} channels, which is no multiple of {step}."
        )
    return notes
