"""Error curves: what a site's output loses as its units go, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from liar_ext.bars import Bar
from liar_ext.calibration.moments import Moments, symmetric
from liar_ext.data.batches import FOLDS
from liar_ext.errors import InputError
from liar_ext.models.sites import Site, get_consumer_weight

# The curves hardly depend on λ; 1e-2 is where most held-out choices end with some 50,000 tokens.
CURVE_DAMP = 1e-2
ROW_BLOCK = 256


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

    ``E(k) = Σ_folds tr(ΔW_k G_B ΔW_kᵀ) / Σ_folds tr(W G_B Wᵀ)``: the k units of lowest score are
    gone and folded into the others on fold A, and B is the other fold. Works with any criterion:
    the order is that in which its scores let units go.

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
        If λ leaves a Gram matrix singular.
    """
    curves = {}
    for site in Bar(at, desc="curves", disable=not progress):
        moments = bank[site.name]
        weight = get_consumer_weight(model, site).to(moments.gram.device, torch.float64)
        order = removal_order(site.per_unit(scores[site.name]), site.groups)
        curve = sum(
            error_curve(
                weight, moments.gram[fold], order, damp, holdout=moments.gram[FOLDS - 1 - fold]
            )
            for fold in range(FOLDS)
        )
        curves[site.name] = curve / curve[-1] if curve[-1] > 0 else torch.zeros_like(curve)
    return curves


def energy_shares(
    model: nn.Module, bank: Mapping[str, Moments], team: Sequence[Site]
) -> list[float]:
    """Return what each site has of the sum of ``tr(W G Wᵀ)`` over sites of one layer."""
    if len(team) == 1:
        return [1.0]
    energies = []
    for site in team:
        gram = symmetric(bank[site.name].gram.sum(0).double())
        weight = get_consumer_weight(model, site).to(gram)
        energies.append(float(((weight @ gram) * weight).sum()))
    total = sum(energies)
    return [each / total if total > 0 else 0.0 for each in energies]


def error_curve(
    weight: Tensor, gram: Tensor, order: Tensor, damp: float, holdout: Tensor | None = None
) -> Tensor:
    """Return ``tr(ΔW_k G ΔW_kᵀ)`` after the first k units of ``order`` are gone, for every k.

    With the features in reverse order of removal, every kept set is a leading block, and one
    Cholesky factor ``G + Λ = L Lᵀ`` solves for all of them: ``ΔW_k = −Y_P Z_P`` where ``Y = W L``,
    ``Z = L⁻¹``, and P are the trailing columns of Y and rows of Z. So the error is the sum over the
    trailing block of ``YᵀY ∘ Z G Zᵀ``, and one pass over that matrix gives the curve.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(d_out, d)`` float64.
    gram : Tensor
        ``G``, ``(d, d)``, to solve with; lower triangle.
    order : Tensor
        ``(units,)`` int64: every unit, in the order in which they go. Their width is d / units.
    damp : float
        λ; ``Λ = λ · mean(diag G) · I``.
    holdout : Tensor, optional
        ``(d, d)``, to evaluate the error with instead of ``gram``; lower triangle.

    Returns
    -------
    Tensor
        ``(units + 1,)`` float64.

    Raises
    ------
    InputError
        If ``G + Λ`` is singular.
    """
    d, units = weight.shape[1], len(order)
    features = torch.arange(d, device=gram.device).view(units, -1)[order.flip(0)].flatten()
    shifted = _arranged(gram, features)
    mean = shifted.diagonal().mean()
    shifted.diagonal().add_(damp * torch.where(mean > 0, mean, 1.0))
    factor, code = torch.linalg.cholesky_ex(shifted)
    del shifted  # at d = 11,008 each of these is a gigabyte
    if code != 0:
        raise InputError(f"error_curve: damp={damp} leaves the Gram matrix singular; raise it")
    outputs = weight[:, features] @ factor
    inverse = lower_inverse(factor)
    del factor
    judge = _arranged(gram if holdout is None else holdout, features)
    steps = torch.zeros(d, dtype=judge.dtype, device=judge.device)
    # Z is lower triangular and the terms are symmetric: a quarter of the products is enough.
    blocks = [slice(start, min(start + ROW_BLOCK, d)) for start in range(0, d, ROW_BLOCK)]
    for index, rows in enumerate(blocks):
        judged = inverse[rows, : rows.stop] @ judge[: rows.stop, : rows.stop]
        for columns in blocks[: index + 1]:
            end = columns.stop
            terms = judged[:, :end] @ inverse[columns, :end].mT
            terms *= outputs[:, rows].mT @ outputs[:, columns]
            if columns is rows:
                steps[rows] += terms.diagonal()
                terms = terms.tril(-1)
            steps[columns] += 2 * terms.sum(0)
    curve = steps.flip(0).cumsum(0)[d // units - 1 :: d // units]
    return torch.cat([curve.new_zeros(1), curve.clamp_min(0.0)])


def lower_inverse(factor: Tensor) -> Tensor:
    """Return L⁻¹ of a lower triangular L, ``(d, d)``.

    By halves, ``[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``: two thirds of the operations
    of a triangular solve for the identity, and nearly all of them products.
    """
    d = len(factor)
    if d <= ROW_BLOCK:
        eye = torch.eye(d, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye, upper=False)
    half = d // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half] = lower_inverse(factor[:half, :half])
    inverse[half:, half:] = lower_inverse(factor[half:, half:])
    middle = factor[half:, :half] @ inverse[:half, :half]
    inverse[half:, :half] = inverse[half:, half:] @ -middle
    return inverse


def removal_order(scores: Tensor, groups: int = 1) -> Tensor:
    """Return the units ``(units,)`` in the order in which they go, lowest score first.

    Of ``groups`` runs of units each loses one in turn. Ties: the higher index goes first.
    """
    by_group = scores.reshape(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True).flip(1)
    offset = torch.arange(groups, device=order.device)[:, None] * by_group.shape[1]
    return (order + offset).mT.flatten()


def _arranged(gram: Tensor, features: Tensor) -> Tensor:
    """Return the full float64 matrix over ``features`` from a lower triangle."""
    return symmetric(gram.double())[features[:, None], features]
