"""Solve one consumer from its sums, and all sites of a plan from theirs, in one pass."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liar_ext.calibration.taps import Moments, check_finite, check_folds
from liar_ext.models.plan import Plan
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites
from liar_ext.ops.reference import NOT_FINITE, symmetric
from liar_ext.reconstruction import ridge
from liar_ext.reconstruction.ladder import oom_fallback, slices
from liar_ext.reconstruction.ridge import BOTH, WITH_BIAS, Residual, check_settings, ratio
from liar_ext.system.distributed import share
from liar_ext.system.errors import InputError, naming_memory
from liar_ext.system.progress import Bar

ON_HOST = "on the CPU, as the GPU had no room"  # ends the path of a solve
NO_ERROR = 1e-6  # a relative error that no site of a real model has
BY_BLOCKS = "by blocks in a file, as memory had no room"  # is in it


@dataclass(frozen=True)
class SiteRow:
    """What happened at one site; a row that was read from a file has None for what that lacks.

    Errors are relative to ``tr(W G Wᵀ)``, the energy of the consumer's output.
    """

    name: str
    units_before: int
    units_after: int
    params_before: int
    params_after: int
    damp: float  # λ; infinity for plain dropping
    error: float
    holdout_error: float  # cross-validated; λ was chosen by it
    condition: float  # a lower bound
    dropped_rows: int
    path: str
    seconds: float
    target: str = "dense-input"  # what errors are measured to
    share: float = 0.0  # how far towards the target, from the dense weight, the solve was taken
    sensitivity: float | None = None  # nats that the output loses per unit of relative error
    certified_error: float | None = None  # on text that no decision has seen
    tokens: int | None = None  # that reached an expert that was solved

    @property
    def is_pruned(self) -> bool:
        """Whether units were removed, as far as it is known."""
        counts = self.units_before, self.units_after
        return None not in counts and self.units_after < self.units_before


class Singular(InputError):
    """``G_KK + Λ`` is singular at a given damp."""


@dataclass(frozen=True)
class Solution:
    """The new consumer of one site, with its errors relative to ``tr(W G Wᵀ)``."""

    weight: Tensor  # W', (d_out, n_kept) float64
    bias: Tensor | None  # b', (d_out,) float64; None if the consumer keeps its bias
    damp: float  # λ taken; infinity means that plain dropping did best
    error: float  # tr(ΔW G ΔWᵀ) over all calibration tokens; with a target the error to it
    holdout_error: float  # solved on one fold and judged on the other, both ways, added up
    condition: float  # lower bound on the condition number of G_KK + Λ
    path: str  # what was solved, e.g. "linear, cholesky float64"
    step_size: float = 0.0  # α, from the consumer's own target, 0, to the given one, 1

    def row(self, name: str, before: int, after: int, unit: int, **facts: object) -> SiteRow:
        """Return the row of the report, by units before and after, and parameters of a unit."""
        names = "damp", "error", "holdout_error", "condition", "path"
        own = {each: getattr(self, each) for each in names}
        counts = name, before, after, before * unit, after * unit
        return SiteRow(*counts, **own, share=self.step_size, **facts)


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    kept: Tensor,
    *,
    target: Residual | None = None,
    step: tuple[float, float] = (0.0, 0.0),
    mode: str = "auto",
    damp: float | str = "auto",
) -> Solution:
    """Reconstruct one consumer ``y = W x + b`` from the features that are kept.

    ``linear``: ``W' = W_K + W_P G_PK (G_KK + Λ)⁻¹`` with ``Λ = λ · mean(diag G_KK) · I``.
    ``affine``: the same with the centred Gram ``C``, and ``b' = b + W_P (μ_P − T μ_K)``.
    ``bias``: the affine form with ``T = 0`` (FLAP). ``none``: plain dropping.

    A target ``y*`` may ask for more than the dense output. With the residual ``r = y* − (W x + b)``
    a step α towards it is taken::

        W' = W_K + (W_P G_PK + α Σ r x_Kᵀ) (G_KK + Λ)⁻¹

    In the affine form all sums are centred, and ``b' = b + W μ + α ρ − W' μ_K`` with μ, ρ the means
    of x and r.

    λ and α, within ``step``, have the least error ``Σ |W' x_K + b' − y*|²`` on held-out tokens:
    solved on fold A and judged on fold B, and the other way round. The returned weight is solved
    with them on both folds. Errors are those to the full target, relative to ``tr(W G Wᵀ)``.

    W is ``(d_out, d_in)``, b ``(d_out,)`` or None, ``moments`` are those of x, and ``kept`` are
    features, ``(n_kept,)`` int64, ascending. InputError is raised if a fold has no tokens and
    ``mode`` isn't ``none``, or a given damp leaves ``G_KK + Λ`` singular.

    Source: LIAR, arXiv:2407.13331; docs/method.md, "Reconstruction" and "Choice of λ".
    """
    device, weight, kept = moments.gram.device, weight.detach(), kept.to(moments.gram.device)

    def in_memory() -> Solution:
        system = ridge.System(weight.to(device), bias, moments, kept, target, mode)
        return solution_of(system, step, damp)

    def in_file() -> Solution:
        system = ridge.SystemInFile(weight, bias, moments, kept, target, mode)
        found = solution_of(system, step, damp)
        return replace(found, path=f"{found.path}, {BY_BLOCKS}")

    def on_host() -> Solution:
        given = weight.cpu(), None if bias is None else bias.detach().cpu(), _on_host(moments)
        asked = None if target is None else _on_host(target)
        found = solve(*given, kept.cpu(), target=asked, step=step, mode=mode, damp=damp)
        new = found.weight.to(device), None if found.bias is None else found.bias.to(device)
        return replace(found, weight=new[0], bias=new[1], path=f"{found.path}, {ON_HOST}")

    return oom_fallback(device, in_memory, in_file, on_host)


def _on_host(sums: Moments | Residual) -> Moments | Residual:
    return type(sums)(*(part.cpu() for part in vars(sums).values()))


def solution_of(
    system: ridge.System, step: tuple[float, float] = (0.0, 0.0), damp: float | str = "auto"
) -> Solution:
    """Choose λ and the step size on held-out tokens, and solve with them on all."""
    moments, target, form = system.moments, system.target, system.form
    starved = form == "none" and bool((moments.tokens <= 0).any())
    if not starved:
        check_folds(moments)
    if target is not None:
        check_finite(target.cross, target.total, target.energy)
    unfitted = target is None and len(system.kept) == system.weight.shape[1]
    ladder = [math.inf] if unfitted or form in ("none", "bias") else ridge.damp_ladder(damp)
    choice = system.choose(ladder, step)
    new, error, energy, code, condition = system.solve(choice)
    if code != 0 or not torch.isfinite(choice.held_out):
        if code == NOT_FINITE or damp == "auto":
            raise InputError(
                "reconstruct: weights must be finite, got a NaN or an infinity in one of them, or "
                "values so large that no damp gives a finite held-out error, not even plain "
                "dropping; load the model in a wider dtype, or leave the site out"
            )
        raise Singular(
            f"reconstruct: G_KK + Λ is not positive definite at damp={choice.damp}; "
            'use damp="auto" or a larger damp'
        )
    bias = None
    if system.affine:
        mean, offset = system.means(BOTH)
        # W μ by blocks, as the weight may be of another dtype.
        parts = (system.weight[here] for here in slices(len(system.weight)))
        bias = torch.cat([part.double() @ mean for part in parts])
        bias = (0.0 if system.bias is None else system.bias.detach().to(mean)) + bias
        bias = bias - new @ mean[system.kept] + choice.step_size * offset
    path = form
    if starved:
        path = "drop, a fold has no tokens"
    elif choice.damp < math.inf:
        path = f"{form}, cholesky float64"
    elif form in ("linear", "affine"):
        path = f"{form}, drop"
    if target is not None and len(ladder) > 1:
        path += f", {choice.tried} of {len(ladder)} λ"
    return Solution(
        weight=new,
        bias=bias,
        damp=choice.damp,
        error=ratio(error, energy),
        holdout_error=ratio(choice.held_out, energy),
        condition=float(condition),
        path=path,
        step_size=choice.step_size,
    )


def error_on(
    model: nn.Module,
    site: Site,
    plan: Plan,
    new: tuple[Tensor, Tensor | None],
    moments: Moments,
    target: Residual | None = None,
) -> float:
    """Return the error of a site's new consumer, W' and b', on sums that it was not solved on.

    ``Σ_t |ΔW x_t + Δb + r_t|² / Σ_t |W x_t|²`` with ``ΔW = W − W' S``, S selecting the features
    that the plan keeps, and r the residual of the target. NaN if the dense output is zero.
    """
    gram, total, tokens = moments.pooled()
    gram, bias = symmetric(gram), get_consumer_bias(model, site)
    old = get_consumer_weight(model, site).to(gram)
    lost, shift = old.clone(), old.new_zeros(len(old))
    lost[:, site.features(plan.sites[site.name].kept).to(lost.device)] -= new[0].to(gram)
    if new[1] is not None:
        shift = (0.0 if bias is None else bias.to(gram)) - new[1].to(gram)
    error = ((lost @ gram) * lost).sum() + 2 * shift @ (lost @ total)
    error += tokens * shift.square().sum()
    if target is not None:
        error += 2 * ((lost.mT * target.cross.sum(0)).sum() + shift @ target.total.sum(0))
        error += target.energy.sum()
    return float(error.clamp(min=0) / ((old @ gram) * old).sum())


def reconstruct(
    model: nn.Module,
    bank: Mapping[str, Moments],
    plan: Plan,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
    drop_singular: bool = False,
    progress: bool = False,
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], list[SiteRow]]:
    """Solve every site of ``plan`` and return its new consumer weights and its report row.

    See :func:`liar_ext.reconstruction.solve.solve` for the mathematics. The model stays as it is;
    hand the weights to :func:`liar_ext.apply_plan`.

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
        Experts, and sites that are :attr:`liar_ext.models.sites.Site.shared`, can't gain a bias;
        those that lack one get the form without it.
    damp : float or "auto"
        λ, or ``"auto"``: the one of a ladder with the least held-out error, per site.
    drop_singular : bool
        Drop the units of a site that a given damp leaves singular, in place of an error.
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
        If the mode or damp is unknown, a given damp leaves a site singular, or the bank lacks one.
    """
    check_settings(mode, damp)
    by_name = {site.name: site for site in sites(model, attn_unit=plan.attn_unit)}
    held = {name: site.units for name, site in by_name.items() if name in bank}
    plan.check_sites(held, "reconstruct")
    weights, rows = {}, []
    routed = getattr(bank, "source", {}).get("routed", {})
    for name, kept in Bar(plan.sites.items(), desc="reconstruct", shown=progress):
        start, site, moments, form = time.perf_counter(), by_name[name], bank[name], mode
        weight, bias = get_consumer_weight(model, site), get_consumer_bias(model, site)
        if site.expert is not None or site.shared:
            form = ridge.form_of_expert(mode, bias is not None, moments)
        with naming_memory(f"reconstruct: out of memory in the solve of {name}"):
            given = weight, bias, moments, site.features(kept.kept)
            try:
                solution = solve(*given, mode=form, damp=damp)
            except Singular:
                if not drop_singular:
                    raise
                solution = solve(*given, mode=form, damp=math.inf)
        weights[name] = (solution.weight, solution.bias)
        row = solution.row(
            *(name, site.units, len(kept.kept), site.unit_params),
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
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, SiteRow]]:
    """Return weights and rows by name of sites that ranks share, see :func:`reconstruct`."""

    def solve_own(mine: Sequence[Site]) -> dict[str, tuple]:
        here = replace(plan, sites={site.name: plan.sites[site.name] for site in mine})
        weights, rows = reconstruct(model, bank, here, **settings)
        return {row.name: (weights[row.name], row) for row in rows}

    found = share(at, solve_own)
    weights, rows = ({name: pair[i] for name, pair in found.items()} for i in range(2))
    return weights, rows


def with_bias(plan: Plan, model: nn.Module, mode: str) -> Plan:
    """Return the plan with a bias for each consumer that lacks one, where ``mode`` needs it.

    Experts have no place for one, and layers of shared sites have biases of their own.
    """
    if mode not in WITH_BIAS:
        return plan
    planned = dict(plan.sites)
    for site in sites(model, attn_unit=plan.attn_unit):
        if site.name in planned and site.expert is None and not site.shared:
            bias = get_consumer_bias(model, site) is None
            planned[site.name] = replace(planned[site.name], bias=bias)
    return replace(plan, sites=planned)


def what_to_know(rows: Sequence[SiteRow], mode: str, tokens: int, widest: int) -> list[str]:
    """Return what a user has to know before trusting a result, with the sites that it concerns.

    ``widest`` counts the features of the widest site.
    """

    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)

    pruned = [row for row in rows if row.is_pruned]
    dropped = max((row.dropped_rows for row in rows), default=0)
    unknown = [row.name for row in rows if not math.isfinite(row.error + row.holdout_error)]
    silent = all(row.error < NO_ERROR and row.holdout_error < NO_ERROR for row in pruned)
    plainly = [row.name for row in pruned if math.isinf(row.damp) and mode not in ("none", "bias")]
    few = [row for row in rows if row.tokens is not None and row.tokens < row.units_before]
    starved = [f"{row.name} ({row.tokens})" for row in few]
    notes = [
        (
            dropped,
            f"Up to {dropped} token rows per site held a non-finite value and were left out; "
            "calibrate in a wider dtype.",
        ),
        (
            unknown,
            f"The errors of {some(unknown)} are not finite and say nothing; load the model in a "
            "wider dtype.",
        ),
        (
            pruned and silent,
            "Every error is 0: the activations do not vary over the calibration text, or the "
            "removed units did nothing. Give other text, and look at the model's weights.",
        ),
        (
            plainly,
            f"The cross-validated error is least with plain dropping at {some(plainly)}: give more "
            "calibration text.",
        ),
        (
            starved,
            f"Fewer calibration tokens than the expert has channels reached {some(starved)}: their "
            "channels are chosen, and compensated for, by little or nothing; give more "
            "calibration text.",
        ),
        (
            tokens < 2 * widest,
            f"{tokens} calibration tokens are few for sites of {widest} features; the "
            "cross-validated errors say what that costs.",
        ),
    ]
    return [note for holds, note in notes if holds]
