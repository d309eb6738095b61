"""Reconstruction: fold what was removed into the weights that stay, with its held-out error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch
from liar_ext.calibration.moments import Moments
from liar_ext.calibration.passes import Passes
from liar_ext.calibration.taps import is_relative, relative_weights
from liar_ext.distributed import share
from liar_ext.errors import solving
from liar_ext.models.experts import routed_input
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites
from liar_ext.plan import Plan
from liar_ext.progress import Bar
from liar_ext.reconstruction.ridge import WITH_BIAS, Residual, check_settings, form_of_expert
from liar_ext.reconstruction.solve import error_on, report_row, solve
from liar_ext.rows import SiteRow

Forward = Callable[..., Tensor]


class Rows(NamedTuple):
    """What the consumer of a site reads of some sequences, a row per token.

    Parameters
    ----------
    x : Tensor
        x̂, ``(rows, d_in)``.
    residual : Tensor
        r, ``(rows, d_out)``.
    weight : Tensor
        ``(rows,)``: what each counts, bool or a number.
    """

    x: Tensor
    residual: Tensor
    weight: Tensor


def rows_of(
    model: nn.Module,
    layer: Sequence[Site],
    read: Tensor | tuple[Tensor, Tensor, Tensor],
    residual: Tensor,
    counts: Callable[[int], Tensor],
) -> list[Rows]:
    """Return the rows of each site of a layer.

    Parameters
    ----------
    model : nn.Module
        The model.
    layer : sequence of Site
        One site, or all experts of a layer.
    read : Tensor, or (Tensor, Tensor, Tensor)
        What the consumer reads, or what the module of all experts is called with: tokens, chosen
        experts and their weights.
    residual : Tensor
        What the layer's output falls short by, a row per token.
    counts : callable
        Gives for a number of tokens which of them are no padding.
    """
    if layer[0].expert is None:
        x = read.flatten(0, -2)
        return [Rows(x, residual, counts(len(x)))]
    tokens, _, given = read
    used = counts(len(tokens))
    residual = residual / given.sum(-1, keepdim=True).to(residual)
    found = []
    for site in layer:
        routed = routed_input(model, site, read)
        here = used[routed.token]
        asked = residual[routed.token][here]
        found.append(Rows(routed.x[here], asked, routed.weight[here].double().square()))
    return found


def counted(
    batch: Batch, site: Site, tokens: int, output: Tensor, total: Tensor | None = None
) -> Tensor:
    """Return what each of ``tokens`` rows counts: 0 for padding, and 1 unless a norm follows.

    A norm that reads the ``output``, or the ``total`` of it and the stream, divides by the size of
    what it reads; see :func:`liar_ext.calibration.taps.relative_weights`.
    """
    used = batch.counting(tokens, output.device, site.part.mask)
    if total is not None:
        return used * relative_weights(total.flatten(0, -2), centred=True)
    return used * relative_weights(output.flatten(0, -2)) if is_relative(site) else used


@dataclass
class LayerSums:
    """Sums over the tokens of one site.

    Parameters
    ----------
    moments : Moments
        Of x̂.
    residual : Residual
        Of r.
    rows : int
        How many tokens there were.
    """

    moments: Moments
    residual: Residual
    rows: int = 0

    @classmethod
    def zeros(cls, site: Site, device: torch.device) -> LayerSums:
        """Return the sums over no tokens."""
        residual = Residual.zeros(site.d_in, site.d_out, device=device)
        return cls(Moments.zeros(site.d_in, device=device), residual)

    def add(self, rows: Rows, fold: int) -> None:
        """Add tokens to a fold; those with a value that isn't finite are left out and counted."""
        (x, r, weight), moments = rows, self.moments
        self.rows += int((weight > 0).sum())
        x = x.to(r.dtype)
        usable = torch.isfinite(x).all(-1) & torch.isfinite(r).all(-1)
        moments.count[fold, 1] += (weight.bool() & ~usable).sum()
        moments.update(x, fold, weight * usable)
        self.residual.update(x, r, fold, weight * usable)


def layer_forward(model: nn.Module, layer: Sequence[Site], new: Mapping[str, Forward]) -> Forward:
    """Return what takes the place of a layer's consumer, or of the module of all experts."""
    if layer[0].expert is None:
        return new[layer[0].name]

    def experts(*args: Tensor) -> Tensor:
        hidden = args[0]
        total = torch.zeros_like(hidden)
        for site in layer:
            routed = routed_input(model, site, args)
            given = new[site.name](routed.x) * routed.weight[:, None]
            total.index_add_(0, routed.token, given.to(total.dtype))
        return total

    return experts


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
        start = time.perf_counter()
        site = by_name[name]
        weight, bias, form = get_consumer_weight(model, site), get_consumer_bias(model, site), mode
        if site.expert is not None:
            form = form_of_expert(mode, bias is not None, bank[name])
        with solving(name):
            features = site.features(kept.kept)
            solution = solve(weight, bias, bank[name], features, mode=form, damp=damp)
        weights[name] = (solution.weight, solution.bias)
        seconds = time.perf_counter() - start
        row = report_row(site, len(kept.kept), bank[name].dropped_rows, solution, seconds)
        rows.append(replace(row, tokens=sum(routed[name]) if name in routed else None))
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
    by_name = {site.name: site for site in sites(model, attn_unit=plan.attn_unit)}
    planned = {
        name: replace(site, bias=get_consumer_bias(model, by_name[name]) is None)
        for name, site in plan.sites.items()
        if by_name[name].expert is None
    }
    planned = {**plan.sites, **planned}
    return replace(plan, sites=planned)


def certified_errors(
    passes: Passes, plan: Plan, weights: Mapping[str, tuple[Tensor, Tensor | None]]
) -> dict[str, float]:
    """Return the error of each site's new weights on the dense inputs of fresh text.

    No decision saw that text, so this is an unbiased estimate. Held-out errors are not: λ was
    chosen by them, and scores and error curves read both folds.

    Parameters
    ----------
    passes : Passes
        Of the dense model over the fresh text.
    plan : Plan
        What stays.
    weights : mapping of str to (Tensor, Tensor or None)
        New consumer weight and bias by site name.
    """
    errors = {}
    for site in (site for group in passes for site in group):
        given = (get(passes.model, site) for get in (get_consumer_weight, get_consumer_bias))
        kept, name = site.features(plan.sites[site.name].kept), site.name
        errors[name] = error_on(*given, kept, weights[name], passes.bank[name])
    return errors
