"""Reconstruction: fold what was removed into the weights that stay, with its held-out error."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from liar_ext.calibration.moments import Moments
from liar_ext.calibration.passes import Passes
from liar_ext.distributed import share
from liar_ext.errors import solving
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites
from liar_ext.plan import Plan
from liar_ext.progress import Bar
from liar_ext.reconstruction.ridge import WITH_BIAS, check_settings, form_of_expert
from liar_ext.reconstruction.solve import error_on, solve
from liar_ext.rows import SiteRow


def reconstruct(
    model: nn.Module,
    bank: Mapping[str, Moments],
    plan: Plan,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
    progress: bool = False,
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], list[SiteRow]]:
    """Solve every site of ``plan`` and return its new consumer weights and its report row.

    See :func:`liar_ext.reconstruction.solve.solve` for the mathematics. The model is read, not
    changed; hand the weights to :func:`liar_ext.apply_plan`.

    Parameters
    ----------
    model : nn.Module
        The dense model.
    bank : mapping of str to Moments
        From :func:`liar_ext.calibrate`.
    plan : Plan
        What stays; for the modes that give a bias, from :func:`with_bias`.
    mode : {"auto", "none", "bias", "linear", "affine"}
        Form of the new weights; ``auto`` is affine at consumers that have a bias, linear at others.
        Experts can't gain a bias; those that lack one get the form without it.
    damp : float or "auto"
        λ, or ``"auto"``: the one of a ladder with the least held-out error, per site. An expert
        that no token of one fold reaches is dropped from plainly, as nothing would tell of a λ.
    progress : bool
        Show a progress bar.

    Returns
    -------
    weights : dict of str to (Tensor, Tensor or None)
        New consumer weight ``(d_out, n_kept)`` and bias ``(d_out,)`` by site name.
    rows : list of SiteRow
        One per site of the plan, in the plan's order.

    Raises
    ------
    InputError
        If the mode or damp is unknown, or the bank lacks a site of the plan.
    """
    check_settings(mode, damp)
    by_name = {site.name: site for site in sites(model, attn_unit=plan.attn_unit)}
    plan.check_sites(by_name.keys() & bank.keys(), "reconstruct")
    weights, rows = {}, []
    routed = getattr(bank, "source", {}).get("routed", {})
    for name, kept in Bar(plan.sites.items(), desc="reconstruct", disable=not progress):
        start, site, moments, form = time.perf_counter(), by_name[name], bank[name], mode
        weight, bias = get_consumer_weight(model, site), get_consumer_bias(model, site)
        if site.expert is not None:
            form = form_of_expert(mode, bias is not None, moments)
        with solving(name):
            features = site.features(kept.kept)
            solution = solve(weight, bias, moments, features, mode=form, damp=damp)
        weights[name] = (solution.weight, solution.bias)
        row = solution.row_of(
            site,
            len(kept.kept),
            dropped_rows=moments.dropped_rows,
            seconds=time.perf_counter() - start,
            tokens=sum(routed[name]) if name in routed else None,
        )
        rows.append(row)
    return weights, rows


def reconstruct_shared(
    model: nn.Module,
    bank: Mapping[str, Moments],
    plan: Plan,
    at: Sequence[Site],
    **settings: object,
) -> dict[str, tuple[tuple[Tensor, Tensor | None], SiteRow]]:
    """Return weights and row by name of some sites of a plan, which ranks share.

    ``settings`` are those of :func:`reconstruct`.
    """

    def solve_own(mine: Sequence[Site]) -> dict[str, tuple]:
        here = replace(plan, sites={site.name: plan.sites[site.name] for site in mine})
        weights, rows = reconstruct(model, bank, here, **settings)
        return {row.name: (weights[row.name], row) for row in rows}

    return share(at, solve_own)


def with_bias(plan: Plan, model: nn.Module, mode: str) -> Plan:
    """Return the plan with a bias for each consumer that lacks one, where ``mode`` needs it.

    Experts gain none, as their module has no place for it.
    """
    if mode not in WITH_BIAS:
        return plan
    planned = dict(plan.sites)
    for site in sites(model, attn_unit=plan.attn_unit):
        if site.name in planned and site.expert is None:
            bias = get_consumer_bias(model, site) is None
            planned[site.name] = replace(planned[site.name], bias=bias)
    return replace(plan, sites=planned)


def certified_errors(
    passes: Passes, plan: Plan, weights: Mapping[str, tuple[Tensor, Tensor | None]]
) -> dict[str, float]:
    """Return the error of each site's new weights, by name, on the dense inputs of fresh text.

    No decision saw that text, over which ``passes`` run the dense model, so this is an unbiased
    estimate. Held-out errors are not: λ was chosen by them, and scores and error curves read both
    folds.
    """
    errors = {}
    for site in (site for group in passes for site in group):
        given = (get(passes.model, site) for get in (get_consumer_weight, get_consumer_bias))
        kept, name = site.features(plan.sites[site.name].kept), site.name
        errors[name] = error_on(*given, kept, weights[name], passes.bank[name])
    return errors
