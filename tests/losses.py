"""Losses of sites, as a job finds them."""

from __future__ import annotations

from liar_ext.selection.error_curves import (
    energy_shares,
    error_curves,
    losses_of,
    probe_sites,
    sensitivities_of,
)
from liar_ext.selection.sensitivity import site_divergences


def measure_losses(model, bank, at, scores, budget, batches):
    """Return losses and sensitivities by site."""
    curves = error_curves(model, bank, at, scores)
    probes = probe_sites(model, bank, at, scores, curves, budget)
    measured = site_divergences(model, batches, probes.plan, probes.weights)
    found = sensitivities_of(probes.errors, measured)
    return losses_of(curves, found, energy_shares(model, bank, at)), found
