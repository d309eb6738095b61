"""Error curves: what a site's output loses as its units go, and the whole model's by that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import (
    FOLDS,
    Batches,
    completed,
    probe_batches,
    read_batches,
)
from liar_ext.calibration.taps import Moments
from liar_ext.models.plan import AUTO_TILE, LEAST_STEPS, Budget, Plan
from liar_ext.models.registry import type_of
from liar_ext.models.sites import Site, get_consumer_weight, teams_of
from liar_ext.models.slicing import allowed_counts, site_step
from liar_ext.ops.reference import symmetric
from liar_ext.reconstruction.ladder import factor_with_damp, in_file, oom_fallback, slices
from liar_ext.reconstruction.solve import reconstruct_shared, with_bias
from liar_ext.selection.allocation import allocate, probe_plan, removal_order
from liar_ext.selection.costs import Costs
from liar_ext.selection.criteria import check_given
from liar_ext.system.errors import InputError, naming_memory
from liar_ext.system.progress import Bar

# The curves hardly depend on λ; 1e-2 is where most held-out choices end with some 50,000 tokens.
CURVE_DAMP = 1e-2
PANEL = 1024  # columns of L⁻¹ that are computed together


def error_curves(
    model: nn.Module,
    bank: Mapping[str, Moments],
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    *,
    damp: float = CURVE_DAMP,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return the held-out error of every site for every number of units removed.

    ``E(k) = Σ_folds tr(ΔW_k G_B ΔW_kᵀ) / Σ_folds tr(W G_B Wᵀ)``: the k units of lowest score, by
    any criterion, are gone and folded into the others on fold A, and B is the other fold.

    Parameters
    ----------
    model : nn.Module
        The dense model.
    bank : mapping of str to Moments
        From :func:`liar_ext.calibrate`.
    at : sequence of Site
        Sites to evaluate.
    scores : mapping of str to Tensor
        ``(units,)``, or ``(d_in,)`` by feature, by site name, from :func:`liar_ext.score`.
    damp : float
        λ of the reconstruction, relative to the mean diagonal of the whole Gram matrix.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict of str to Tensor
        ``(units + 1,)`` float64 by site name, from 0 to 1; it may rise above 1 in between, where
        reconstruction from few tokens does harm.

    Raises
    ------
    InputError
        If λ isn't finite or leaves a Gram matrix singular, or moments or scores of a site are
        missing.
    MemoryError
        If there is no memory, and no room for a file either.
    """
    if not 0.0 <= damp < math.inf:
        raise InputError(f"error_curves: damp must be finite and at least 0, got {damp}")
    check_given(at, bank, "error_curves: moments")
    check_given(at, scores, "error_curves: scores")
    curves = {}
    for site in Bar(at, desc="curves", shown=progress):
        moments = bank[site.name]
        weight = get_consumer_weight(model, site).to(moments.gram.device, torch.float64)
        order = removal_order(site.per_unit(scores[site.name]), site.groups)
        with naming_memory(f"error_curves: out of memory in the error curve of {site.name}"):
            curve = _held_out(weight, moments.gram, order, damp)
        curves[site.name] = curve / curve[-1] if curve[-1] > 0 else torch.zeros_like(curve)
    return curves


def _held_out(weight: Tensor, gram: Tensor, order: Tensor, damp: float) -> Tensor:
    """Return the sum of both folds' curves, to the same bits where memory is short."""

    def both(allocate: Callable[..., Tensor] | None = None) -> Tensor:
        folds = ((gram[fold], gram[FOLDS - 1 - fold]) for fold in range(FOLDS))
        return sum(error_curve(weight, own, order, damp, other, allocate) for own, other in folds)

    def on_host() -> Tensor:
        return _held_out(weight.cpu(), gram.cpu(), order.cpu(), damp).to(weight.device)

    return oom_fallback(weight.device, both, lambda: both(in_file), on_host)


def energy_shares(
    model: nn.Module, bank: Mapping[str, Moments], at: Sequence[Site]
) -> dict[str, float]:
    """Return what each site has of the sum of ``tr(W G Wᵀ)`` over the sites of its layer."""

    def energy(site: Site) -> float:
        gram = symmetric(bank[site.name].gram.sum(0).double())
        weight = get_consumer_weight(model, site).to(gram)
        return float(((weight @ gram) * weight).sum())

    shares = {}
    for team in teams_of(at).values():
        energies = [energy(site) for site in team] if len(team) > 1 else [1.0]
        total = sum(energies)
        for site, own in zip(team, energies, strict=True):
            shares[site.name] = own / total if total > 0 else 0.0
    return shares


def error_curve(
    weight: Tensor,
    gram: Tensor,
    order: Tensor,
    damp: float,
    holdout: Tensor | None = None,
    allocate: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return ``tr(ΔW_k G ΔW_kᵀ)`` after the first k units of ``order`` are gone, for every k.

    With the features in reverse order of removal, every kept set is a leading block, and one
    Cholesky factor ``G + Λ = L Lᵀ`` solves for all of them: ``ΔW_k = −Y_P Z_P`` where ``Y = W L``,
    ``Z = L⁻¹``, and P are the trailing columns of Y and rows of Z. So the error is the sum over the
    trailing block of ``YᵀY ∘ Z G Zᵀ``, and one pass over that matrix gives the curve.

    W is ``(d_out, d)`` float64, ``gram`` and ``holdout`` are lower triangles ``(d, d)``: G to solve
    with, and to judge with. ``order`` has every unit. ``allocate`` returns zeros for what is as
    large as G, twice, and as W; all else is by blocks. InputError if ``G + Λ`` is singular.
    """
    allocate = allocate or weight.new_zeros
    d, units = weight.shape[1], len(order)
    features = torch.arange(d, device=gram.device).view(units, -1)[order.flip(0)].flatten()
    square = allocate(d, d)
    _arrange(gram, features, square)
    if not factor_with_damp(square, damp):
        raise InputError(f"error_curve: damp={damp} leaves the Gram matrix singular; raise it")
    square.tril_()
    outputs = allocate(len(weight), d)
    for rows in slices(len(weight)):
        outputs[rows] = weight[rows][:, features]
    for columns in slices(d):
        outputs[:, columns] = outputs[:, columns.start :] @ square[columns.start :, columns]
    invert_in_place(square)
    judge = allocate(d, d)
    _arrange(gram if holdout is None else holdout, features, judge)
    steps = torch.zeros(d, dtype=judge.dtype, device=judge.device)
    # Z is lower triangular and the terms are symmetric: a quarter of the products is enough.
    for rows in slices(d):
        judged = square[rows, : rows.stop] @ judge[: rows.stop, : rows.stop]
        for columns in slices(rows.stop):
            end = columns.stop
            terms = judged[:, :end] @ square[columns, :end].mT
            terms *= outputs[:, rows].mT @ outputs[:, columns]
            if columns == rows:
                steps[rows] += terms.diagonal()
                terms = terms.tril(-1)
            steps[columns] += 2 * terms.sum(0)
    curve = steps.flip(0).cumsum(0)[d // units - 1 :: d // units]
    return torch.cat([curve.new_zeros(1), curve.clamp_min(0.0)])


def invert_in_place(factor: Tensor) -> None:
    """Put L⁻¹ in the place of a lower triangular L, ``(d, d)``, which has zeros above the diagonal.

    By blocks of rows, ``[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``.
    """
    for rows in slices(len(factor)):
        eye = torch.eye(rows.stop - rows.start, dtype=factor.dtype, device=factor.device)
        corner = torch.linalg.solve_triangular(factor[rows, rows], eye, upper=False)
        factor[rows, rows] = corner
        for panel in slices(rows.start, PANEL):
            below = slice(panel.start, rows.start)
            factor[rows, panel] = corner @ -(factor[rows, below] @ factor[below, panel])


def _arrange(gram: Tensor, features: Tensor, into: Tensor) -> None:
    """Fill a square with the whole matrix over ``features``; ``gram`` is its lower triangle."""
    for rows in slices(len(features)):
        at = features[rows]
        across, down = gram[at][:, features], gram[:, at][features].mT
        into[rows] = torch.where(at[:, None] >= features, across, down)


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
    """Return the probes of some sites, with about the budget's fraction of each gone."""
    plan = with_bias(probe_plan(at, scores, budget, model_type=type_of(model)), model, mode)
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
    """Return ``a_s = KL(dense ‖ only s pruned) / E_s`` by site name, in nats per token."""
    return {name: measured[name] / error if error > 0 else 0.0 for name, error in errors.items()}


def losses_of(
    curves: Mapping[str, Tensor], sensitivities: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return ``L_s(k) = a_s · share_s · E_s(k)`` for every number k of units gone, by site name.

    The losses of a plan add up to its predicted divergence. The experts of a layer are measured
    together, and share by energy.
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

    The budget is allocated once more with a tile of 1. As the counts of a grid are some of those,
    the loss at tile 1 is the least of both allocations'.
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
