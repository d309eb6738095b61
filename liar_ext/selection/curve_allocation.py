"""Losses: what the whole model's output loses for every number of units gone, and for plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import Batches, completed, probe_batches, read_batches
from liar_ext.models.plan import AUTO_TILE, LEAST_STEPS, Budget, Plan
from liar_ext.models.registry import type_of
from liar_ext.models.sites import Site, teams_of
from liar_ext.models.slicing import allowed_counts, site_step
from liar_ext.reconstruction.solve import reconstruct_shared, with_bias
from liar_ext.selection.allocation import allocate, probe_plan
from liar_ext.selection.costs import Costs
from liar_ext.selection.error_curves import CURVE_DAMP, energy_shares


def predict_divergence(losses: Mapping[str, Tensor], plan: Plan) -> float:
    """Return the sum of the losses of a plan over all its sites."""
    return sum(float(losses[name][len(site.removed)]) for name, site in plan.sites.items())


def probes_of(model: nn.Module, batches: Batches) -> list[dict[str, Tensor]]:
    """Return a few sequences to measure divergences on, with all that the model reads."""
    return probe_batches(completed(model, batch) for batch in read_batches(batches))


@dataclass
class Probes:
    """What some sites lose, each alone, for its sensitivity to be measured."""

    plan: Plan  # what stays of each when it alone is pruned
    weights: dict[str, tuple[Tensor, Tensor | None]]  # of its consumer then
    errors: dict[str, float]  # its error then; experts have that of all of their layer


def probe_sites(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
    budget: Budget,
    *,
    mode: str = "auto",
) -> Probes:
    """Return the probes of some sites, with about the budget's fraction of each gone.

    ``curves`` come from :func:`error_curves`; ``mode`` is how a site is reconstructed for it. All
    else is as for :func:`liar_ext.allocate` and :func:`liar_ext.reconstruct`.
    """
    plan = probe_plan(at, scores, budget, model_type=type_of(model))
    plan = with_bias(plan, model, mode)
    # Inputs that hardly vary, such as silence, leave sums of rounding errors.
    settings = {"mode": mode, "damp": CURVE_DAMP, "drop_singular": True}
    weights, _ = reconstruct_shared(model, bank, plan, at, **settings)
    errors, shares = {}, energy_shares(model, bank, at)
    for team in teams_of(at).values():
        gone = {site.name: len(plan.sites[site.name].removed) for site in team}
        error = sum(shares[name] * float(curves[name][count]) for name, count in gone.items())
        errors |= dict.fromkeys(gone, error)
    return Probes(plan, weights, errors)


def sensitivities_of(
    errors: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """Return ``a_s = KL(dense ‖ only s pruned) / E_s`` by site name, in nats per token.

    ``errors`` are those of :class:`Probes`, ``measured`` the divergences of their models.
    """
    return {name: measured[name] / error if error > 0 else 0.0 for name, error in errors.items()}


def losses_of(
    curves: Mapping[str, Tensor], sensitivities: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return ``L_s(k) = a_s · share_s · E_s(k)`` for every number k of units gone, by site name.

    That is the site's held-out error curve times its sensitivity. The losses of a plan add up to
    its predicted divergence. The experts of a layer are measured together, and share by energy, see
    :func:`energy_shares`; of any other site the share is 1.
    """
    return {name: sensitivities[name] * share * curves[name] for name, share in shares.items()}


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
    costs: Costs,
    losses: Mapping[str, Tensor] | None = None,
) -> dict[str, object]:
    """Return the grid of every kind of site, and what the plan that was allocated loses by it.

    The budget is allocated once more with a tile of 1, by the same scores and losses. As the
    counts of a grid are some of those, the loss at tile 1 is the least of both allocations': the
    second is one that an approximate search may have missed. ``notes`` are on layers that the grid
    does not suit, and ``warnings`` on those that it keeps from being pruned.
    """
    kinds: dict[tuple[str, int, bool], list[Site]] = {}  # experts apart
    for site in at:
        kinds.setdefault((site.unit, site.units, site.expert is None), []).append(site)
    rows = [_row(some, budget, plan) for some in kinds.values()]
    facts = {"tile": budget.tile, "sites": rows, "objective": OBJECTIVES[method]}
    facts["kept"] = facts["kept_at_tile_1"] = costs.kept_fraction(plan)
    single, finer = replace(budget, tile=1), plan
    if any(site_step(site, budget) != site_step(site, single) for site in at):
        finer = allocate(at, scores, single, method, costs=costs, losses=losses)
        facts["kept_at_tile_1"] = costs.kept_fraction(finer)
    if method == "curve":
        found = [predict_divergence(losses, each) for each in (plan, finer)]
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


def _row(some: Sequence[Site], budget: Budget, plan: Plan) -> dict[str, object]:
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
