"""Error curves: what a site's output loses as its units go, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.moments import Moments
from liar_ext.models.sites import Site, get_consumer_weight, teams_of
from liar_ext.ops.reference import symmetric
from liar_ext.reconstruction.ladder import factor_with_damp, slices
from liar_ext.reconstruction.low_memory import in_file, oom_fallback
from liar_ext.system.distributed import gather
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
    elsewhere: dict[str, str] | None = None,
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
    elsewhere : dict of str to str, optional
        Is given the sites whose curves found no memory, and where they were computed then: on the
        CPU instead of a GPU, or there in a file. See :func:`notes_of`.

    Returns
    -------
    dict of str to Tensor
        ``(units + 1,)`` float64 by site name, from 0 to 1; it may rise above 1 in between, where
        reconstruction from few tokens does harm.

    Raises
    ------
    InputError
        If λ leaves a Gram matrix singular.
    MemoryError
        If there is no memory, and no room for a file either.
    """
    curves = {}
    for site in Bar(at, desc="curves", shown=progress):
        moments = bank[site.name]
        weight = get_consumer_weight(model, site).to(moments.gram.device, torch.float64)
        order = removal_order(site.per_unit(scores[site.name]), site.groups)
        with naming_memory(f"error_curves: out of memory in the error curve of {site.name}"):
            curve, instead = _held_out(weight, moments.gram, order, damp)
        if elsewhere is not None and instead:
            elsewhere[site.name] = instead
        curves[site.name] = curve / curve[-1] if curve[-1] > 0 else torch.zeros_like(curve)
    return curves


def notes_of(elsewhere: Mapping[str, str], at: Sequence[Site]) -> list[str]:
    """Return what a report says of curves that found no memory, at any rank.

    ``elsewhere`` is what :func:`error_curves` told of this rank's share of the sites ``at``.
    """
    told = {name: where for each in gather(elsewhere) for name, where in each.items()}
    notes = []
    for where in sorted(set(told.values())):
        first, *others = (site.name for site in at if told.get(site.name) == where)
        named = f"{first} and {len(others)} more" if others else first
        said = f"An allocation failed in error curves ({named}), which were computed {where}"
        notes.append(f"{said}: give more memory.")
    return notes


def _held_out(weight: Tensor, gram: Tensor, order: Tensor, damp: float) -> tuple[Tensor, str]:
    """Return the sum of both folds' curves, and where they were computed for want of memory.

    On the CPU instead of a GPU, or by matrices in files, to the same bits as in memory.
    """

    def both(allocate: Callable[..., Tensor] | None = None) -> Tensor:
        folds = ((gram[fold], gram[FOLDS - 1 - fold]) for fold in range(FOLDS))
        return sum(error_curve(weight, own, order, damp, other, allocate) for own, other in folds)

    def on_host() -> tuple[Tensor, str]:
        curve, instead = _held_out(weight.cpu(), gram.cpu(), order.cpu(), damp)
        return curve.to(weight.device), instead or "on the CPU"

    return oom_fallback(
        weight.device, lambda: (both(), ""), lambda: (both(in_file), "in a file"), on_host
    )


def energy_shares(
    model: nn.Module, bank: Mapping[str, Moments], at: Sequence[Site]
) -> dict[str, float]:
    """Return what each site has of the sum of ``tr(W G Wᵀ)`` over the sites of its layer."""
    shares = {}
    for team in teams_of(at).values():
        energies = [1.0] if len(team) == 1 else []
        for site in team if len(team) > 1 else ():
            gram = symmetric(bank[site.name].gram.sum(0).double())
            weight = get_consumer_weight(model, site).to(gram)
            energies.append(float(((weight @ gram) * weight).sum()))
        total = sum(energies)
        for site, energy in zip(team, energies, strict=True):
            shares[site.name] = energy / total if total > 0 else 0.0
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
    with, and what to evaluate the error with, G again unless given. ``order`` has every unit,
    ``(units,)`` int64, of ``d / units`` features. ``Λ = damp · mean(diag G) · I``; InputError is
    raised if ``G + Λ`` is singular. ``allocate`` returns zeros, ``(rows, columns)`` float64, for
    what is as large as G, twice, and as W; in memory by default, and all else is by blocks.
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

    By blocks of rows, ``[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``, and of B A⁻¹ by
    panels of columns, which A⁻¹ has no rows above: nearly all of it products.
    """
    for rows in slices(len(factor)):
        eye = torch.eye(rows.stop - rows.start, dtype=factor.dtype, device=factor.device)
        corner = torch.linalg.solve_triangular(factor[rows, rows], eye, upper=False)
        factor[rows, rows] = corner
        for panel in slices(rows.start, PANEL):
            below = slice(panel.start, rows.start)
            factor[rows, panel] = corner @ -(factor[rows, below] @ factor[below, panel])


def _arrange(gram: Tensor, features: Tensor, into: Tensor) -> None:
    """Fill a square with the matrix over ``features`` of which ``gram`` is the lower triangle."""
    for rows in slices(len(features)):
        at = features[rows]
        across, down = gram[at][:, features], gram[:, at][features].mT
        into[rows] = torch.where(at[:, None] >= features, across, down)


def removal_order(scores: Tensor, groups: int = 1) -> Tensor:
    """Return the units ``(units,)`` in the order in which they go, lowest score first.

    Of ``groups`` runs of units each loses one in turn. Ties: the higher index goes first.
    """
    by_group = scores.reshape(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True).flip(1)
    offset = torch.arange(groups, device=order.device)[:, None] * by_group.shape[1]
    return (order + offset).mT.flatten()
