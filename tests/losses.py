"""Losses of sites, as a job finds them."""

from __future__ import annotations

from liar_ext.selection.curve_allocation import losses_of, measure_sensitivities, probe_sites
from liar_ext.selection.error_curves import energy_shares, error_curves


def measure_losses(model, bank, at, scores, budget, batches):
    """Return losses and sensitivities by site."""
    curves = error_curves(model, bank, at, scores)
    probes = probe_sites(model, bank, at, scores, curves, budget)
    found = measure_sensitivities(model, probes, batches)
    return losses_of(curves, found, energy_shares(model, bank, at)), found
