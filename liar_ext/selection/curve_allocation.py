"""Losses: what the whole model's output loses for every number of units gone, and for plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from liar_ext.calibration.moments import MomentBank
from liar_ext.data.batches import Batches, probe_batches, read_batches
from liar_ext.models.inputs import complete_inputs
from liar_ext.models.sites import Site, teams_of
from liar_ext.plan import Budget, Plan
from liar_ext.reconstruction.one_pass import reconstruct_shared, with_bias
from liar_ext.selection.allocation import probe_plan
from liar_ext.selection.error_curves import CURVE_DAMP, energy_shares
from liar_ext.selection.sensitivity import Measured, site_divergences


def predict_divergence(losses: Mapping[str, Tensor], plan: Plan) -> float:
    """Return the sum of the losses of a plan over all its sites."""
    return sum(float(losses[name][len(site.removed)]) for name, site in plan.sites.items())


def probes_of(model: nn.Module, batches: Batches) -> list[dict[str, Tensor]]:
    """Return a few sequences to measure divergences on, with all that the model reads."""
    whole = (
        replace(batch, inputs=complete_inputs(model, batch.inputs, batch.labels))
        for batch in read_batches(batches)
    )
    return probe_batches(whole)


def measure_sensitivities(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
    budget: Budget,
    batches: Batches,
    *,
    mode: str = "auto",
    saved: Measured | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Return ``a_s = KL(dense ‖ only s pruned) / E_s`` by site name, in nats per token.

    It is measured with about the budget's fraction of the site gone. Each site is measured alone,
    experts with all of their layer, so that the value doesn't depend on which others ``at`` has.
    ``curves`` come from :func:`error_curves`, ``batches`` from :func:`probes_of`; ``mode`` is how a
    site is reconstructed for it. All else is as for :func:`liar_ext.allocate`,
    :func:`liar_ext.reconstruct` and :func:`site_divergences`; the model stays as it is.
    """
    probes = probe_sites(model, bank, at, scores, curves, budget, mode=mode, progress=progress)
    given = model, batches, probes.plan, probes.weights
    measured = site_divergences(*given, saved=saved, progress=progress)
    return sensitivities_of(probes.errors, measured)


def sensitivities_of(
    errors: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """Return the divergence of each site's probe by its error."""
    return {name: measured[name] / error if error > 0 else 0.0 for name, error in errors.items()}


@dataclass
class Probes:
    """What some sites lose, each alone, for its sensitivity to be measured.

    Parameters
    ----------
    plan : Plan
        What stays of each site when it alone is pruned.
    weights : dict of str to (Tensor, Tensor or None)
        New consumer weights for that.
    errors : dict of str to float
        Its error then, by site name; experts have that of all of their layer.
    """

    plan: Plan
    weights: dict[str, tuple[Tensor, Tensor | None]]
    errors: dict[str, float]


def probe_sites(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Tensor],
    budget: Budget,
    *,
    mode: str = "auto",
    progress: bool = False,
) -> Probes:
    """Return the probes of some sites; parameters as for :func:`measure_sensitivities`."""
    plan = probe_plan(at, scores, budget, model_type=model.config.model_type)
    plan = with_bias(plan, model, mode)
    settings = {"mode": mode, "damp": CURVE_DAMP, "progress": progress}
    solved = reconstruct_shared(model, bank, plan, at, **settings)
    weights = {name: solved[name][0] for name in solved}
    errors = {}
    for team in teams_of(at).values():
        shares = energy_shares(model, bank, team)
        error = sum(
            share * float(curves[site.name][len(plan.sites[site.name].removed)])
            for site, share in zip(team, shares, strict=True)
        )
        errors |= {site.name: error for site in team}
    return Probes(plan, weights, errors)


def losses_of(
    model: nn.Module,
    bank: MomentBank,
    at: Sequence[Site],
    curves: Mapping[str, Tensor],
    sensitivities: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return ``L_s(k) = a_s · share_s · E_s(k)`` for every number k of units gone, by site name.

    That is the site's held-out error curve times its sensitivity. The losses of a plan add up to
    its predicted divergence. The experts of a layer are measured together, and share by energy; of
    any other site the share is 1.
    """
    losses = {}
    for team in teams_of(at).values():
        for site, share in zip(team, energy_shares(model, bank, team), strict=True):
            losses[site.name] = sensitivities[site.name] * share * curves[site.name]
    return losses
