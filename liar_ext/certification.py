"""Certification: errors on text that no decision has seen.

What a job reports by itself is cross-validated: λ is chosen by the same held-out tokens that the
error is measured on, and scores and error curves read both folds. A third fold, or fresh text, is
seen by no decision, so what it shows is an unbiased estimate.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from liar_ext.calibration.passes import Passes
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight
from liar_ext.plan import Plan

Weights = Mapping[str, tuple[Tensor, Tensor | None]]


def certified_errors(passes: Passes, plan: Plan, weights: Weights) -> dict[str, float]:
    """Return the error of each site's new weights on the dense inputs of fresh text.

    ``Σ_t |ΔW x_t + Δb|² / Σ_t |W x_t|² = (tr(ΔW G ΔWᵀ) + 2 Δbᵀ ΔW s + n Δbᵀ Δb) / tr(W G Wᵀ)``,
    with ``ΔW = W − W' S``, S what selects the features that stay, and G, s, n of the fresh text.

    Parameters
    ----------
    passes : Passes
        Of the dense model over the fresh text.
    plan : Plan
        What stays.
    weights : mapping of str to (Tensor, Tensor or None)
        New consumer weight and bias by site name.

    Returns
    -------
    dict of str to float
        By site name; NaN where the dense output is zero.
    """
    errors = {}
    for group in passes:
        for site in group:
            kept = site.features(plan.sites[site.name].kept)
            errors[site.name] = _error(passes, site, kept, *weights[site.name])
    return errors


def _error(passes: Passes, site: Site, kept: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    gram, total, tokens = passes.bank[site.name].pooled()
    gram = gram.tril() + gram.tril(-1).mT  # the other triangle isn't summed
    old = get_consumer_weight(passes.model, site).detach().to(gram)
    lost = old.clone()
    lost[:, kept.to(lost.device)] -= weight.to(gram)
    error = ((lost @ gram) * lost).sum()
    if bias is not None:
        before = get_consumer_bias(passes.model, site)
        shift = (0 if before is None else before.detach().to(gram)) - bias.to(gram)
        error += 2 * shift @ (lost @ total) + tokens * shift.square().sum()
    energy = ((old @ gram) * old).sum()
    return float(error.clamp(min=0) / energy)
