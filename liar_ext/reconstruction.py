"""Reconstruction: fold what was removed into the weights that stay, with a held-out certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar_ext import ops
from liar_ext.arch import Site, get_consumer_bias, get_consumer_weight, sites
from liar_ext.errors import InputError
from liar_ext.moments import FOLDS, Moments, centre
from liar_ext.plan import Plan
from liar_ext.report import SiteRow

MODES = ("none", "bias", "linear", "affine")
WITH_BIAS = ("bias", "affine")
DAMP_LADDER = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, math.inf)


@dataclass(frozen=True)
class Solution:
    """The new consumer of one site and the certificate of its error.

    Parameters
    ----------
    weight : Tensor
        ``W'``, ``(d_out, n_kept)`` float64.
    bias : Tensor or None
        ``b'``, ``(d_out,)`` float64; None when the consumer keeps the bias it has.
    damp : float
        λ taken; infinity means that plain dropping did best.
    error : float
        ``tr(ΔW G ΔWᵀ) / tr(W G Wᵀ)`` over all calibration tokens.
    holdout_error : float
        The same with the solve on one fold and the error on the other, both ways, added up.
    condition : float
        Lower bound on the condition number of ``G_KK + Λ``.
    path : str
        What was solved, e.g. ``"linear, cholesky float64"``.
    """

    weight: Tensor
    bias: Tensor | None
    damp: float
    error: float
    holdout_error: float
    condition: float
    path: str


def reconstruct(
    model: nn.Module,
    bank: Mapping[str, Moments],
    plan: Plan,
    *,
    mode: str = "linear",
    damp: float | str = "auto",
    progress: bool = False,
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], list[SiteRow]]:
    """Solve every site of ``plan`` and return its new consumer weights and its report row.

    See :func:`solve` for the mathematics. The model is read, not changed; hand the weights to
    :func:`liar_ext.apply_plan`.

    Parameters
    ----------
    model : nn.Module
        The dense model.
    bank : mapping of str to Moments
        From :func:`liar_ext.calibrate`.
    plan : Plan
        What stays; for the modes that give a bias, from :func:`with_bias`.
    mode : {"none", "bias", "linear", "affine"}
        What is put back.
    damp : float or "auto"
        λ, or ``"auto"``: the one of a ladder with the least held-out error, per site.
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
    missing = [name for name in plan.sites if name not in bank or name not in by_name]
    if missing:
        raise InputError(
            f"reconstruct: the model and the moments must hold every site of the plan, missing "
            f"{', '.join(missing[:5])}; calibrate the model that the plan is for"
        )
    weights, rows = {}, []
    for name, kept in tqdm(plan.sites.items(), desc="reconstruct", disable=not progress):
        start = time.perf_counter()
        site = by_name[name]
        solution = solve(
            get_consumer_weight(model, site),
            get_consumer_bias(model, site),
            bank[name],
            site.features(kept.kept),
            mode=mode,
            damp=damp,
        )
        weights[name] = (solution.weight, solution.bias)
        seconds = time.perf_counter() - start
        rows.append(_row(site, len(kept.kept), bank[name], solution, seconds))
    return weights, rows


def with_bias(plan: Plan, model: nn.Module, mode: str) -> Plan:
    """Return the plan with a bias for each consumer that lacks one, where ``mode`` needs it."""
    if mode not in WITH_BIAS:
        return plan
    by_name = {site.name: site for site in sites(model, attn_unit=plan.attn_unit)}
    planned = {
        name: replace(site, bias=get_consumer_bias(model, by_name[name]) is None)
        for name, site in plan.sites.items()
    }
    return replace(plan, sites=planned)


def check_settings(mode: str, damp: float | str) -> None:
    """Raise InputError unless ``mode`` and ``damp`` are ones that :func:`solve` knows."""
    if mode not in MODES:
        raise InputError(f"reconstruct: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if damp != "auto" and not (isinstance(damp, float | int) and damp >= 0):
        raise InputError(f'reconstruct: damp must be "auto" or a number >= 0, got {damp!r}')


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    kept: Tensor,
    *,
    mode: str = "linear",
    damp: float | str = "auto",
) -> Solution:
    """Reconstruct one consumer ``y = W x + b`` from the features that stay.

    ``linear``: ``W' = W_K + W_P G_PK (G_KK + Λ)⁻¹`` with ``Λ = λ · mean(diag G_KK) · I``.
    ``affine``: the same with the centred Gram ``C``, and ``b' = b + W_P (μ_P − T μ_K)``.
    ``bias``: the affine form with ``T = 0`` (FLAP). ``none``: plain dropping.
    λ is the one with the least error on held-out tokens: solved on fold A and judged on fold B, and
    the other way round; the returned weight is solved with it on both folds together.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(d_out, d_in)``.
    bias : Tensor or None
        ``b``, ``(d_out,)``.
    moments : Moments
        Of the consumer's input.
    kept : Tensor
        ``(n_kept,)`` int64, ascending: features that stay.
    mode : {"none", "bias", "linear", "affine"}
        What is put back.
    damp : float or "auto"
        λ, or the choice among ``DAMP_LADDER``.

    Returns
    -------
    Solution

    Raises
    ------
    InputError
        If a fold has no tokens, or a given damp leaves ``G_KK + Λ`` singular.

    Notes
    -----
    Source: METHOD sections 1 and 2; LIAR, arXiv:2407.13331.
    """
    check_settings(mode, damp)
    if (moments.tokens <= 0).any():
        raise InputError(
            "reconstruct: both folds need tokens for the held-out error, got "
            f"{moments.tokens.tolist()}; calibrate with at least two sequences"
        )
    device = moments.gram.device
    wide, kept = weight.detach().to(device, torch.float64), kept.to(device)
    affine = mode in WITH_BIAS
    if mode in ("none", "bias") or len(kept) == wide.shape[1]:
        ladder = [math.inf]
    else:
        ladder = list(DAMP_LADDER) if damp == "auto" else [float(damp)]
    damps = torch.tensor(ladder, dtype=torch.float64, device=device)

    held_out, energy = _cross_validate(wide, moments, kept, damps, affine)
    best = int(held_out.nan_to_num(nan=math.inf).argmin())
    gram, total, tokens = moments.pooled()
    mean = total / tokens
    if affine:
        gram = centre(gram, total, tokens, mean)
    new, error, _, info = ops.reconstruct(wide, gram, kept, damps[best : best + 1])
    if info[0, 0] != 0 or not torch.isfinite(held_out[best]):
        raise InputError(
            f"reconstruct: G_KK + Λ is not positive definite at damp={ladder[best]}; "
            'use damp="auto" or a larger damp'
        )
    new_bias = None
    if affine:
        start = wide.new_zeros(len(wide)) if bias is None else bias.detach().to(wide)
        new_bias = start + wide @ mean - new[0] @ mean[kept]
    path = mode if ladder[best] < math.inf else f"{mode}, drop" if mode in MODES[2:] else mode
    return Solution(
        weight=new[0],
        bias=new_bias,
        damp=ladder[best],
        error=_ratio(error[0], energy),
        holdout_error=_ratio(held_out[best], energy),
        condition=float(info[0, 1]),
        path=f"{path}, cholesky float64" if ladder[best] < math.inf else path,
    )


def _cross_validate(
    weight: Tensor, moments: Moments, kept: Tensor, damps: Tensor, affine: bool
) -> tuple[Tensor, Tensor]:
    """Return the held-out error per damp and ``tr(W G Wᵀ)``, both summed over the folds."""
    held_out = torch.zeros_like(damps)
    energy = damps.new_zeros(())
    for fold in range(FOLDS):
        other = FOLDS - 1 - fold
        gram, holdout = moments.gram[fold], moments.gram[other]
        full = holdout.tril() + holdout.tril(-1).mT
        energy += torch.linalg.vecdot(weight @ full, weight).sum()
        if affine:
            mean = moments.total[fold] / moments.tokens[fold]
            gram = centre(gram, moments.total[fold], moments.tokens[fold], mean)
            holdout = centre(holdout, moments.total[other], moments.tokens[other], mean)
        held_out += ops.reconstruct(weight, gram, kept, damps, holdout=holdout)[2]
    return held_out, energy


def _ratio(error: Tensor, energy: Tensor) -> float:
    """Return ``error / energy``; a consumer whose output is zero has no error to speak of."""
    return max(0.0, float(error / energy)) if energy > 0 else 0.0


def _row(site: Site, units: int, moments: Moments, solution: Solution, seconds: float) -> SiteRow:
    return SiteRow(
        name=site.name,
        units_before=site.units,
        units_after=units,
        params_before=site.params,
        params_after=units * site.unit_params,
        damp=solution.damp,
        error=solution.error,
        holdout_error=solution.holdout_error,
        condition=solution.condition,
        dropped_rows=moments.dropped_rows,
        path=solution.path,
        seconds=seconds,
    )
