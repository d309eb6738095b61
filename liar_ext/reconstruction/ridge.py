"""The ridge problem of one consumer: from sums over tokens to a new weight and its errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.moments import Moments, centre, check_folds
from liar_ext.data.batches import FOLDS
from liar_ext.reconstruction.result import (
    Solution,
    check_solved,
    least_held_out,
    path_of,
    ratio,
)
from liar_ext.reconstruction.settings import WITH_BIAS, check_settings, damp_ladder, form_at

PAIRED_BYTES = 64 << 20  # sums of both folds up to here are solved in one call


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    kept: Tensor,
    *,
    mode: str = "auto",
    damp: float | str = "auto",
) -> Solution:
    """Reconstruct one consumer ``y = W x + b`` from the features that stay.

    ``linear``: ``W' = W_K + W_P G_PK (G_KK + Λ)⁻¹`` with ``Λ = λ · mean(diag G_KK) · I``.
    ``affine``: the same with the centred Gram ``C``, and ``b' = b + W_P (μ_P − T μ_K)``.
    ``bias``: the affine form with ``T = 0`` (FLAP). ``none``: plain dropping.
    λ is the one with the least error on held-out tokens: solved on fold A and judged on fold B, and
    the other way round, see :func:`liar_ext.reconstruction.result.least_held_out`; the returned
    weight is solved with it on both folds together.

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
    mode : {"auto", "none", "bias", "linear", "affine"}
        Form of the new weight; ``auto`` is ``affine`` where there is a bias, ``linear`` elsewhere.
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
    Source: LIAR, arXiv:2407.13331; docs/method.md, section "Reconstruction", and
    docs/method.md, section "Choice of λ".
    """
    check_settings(mode, damp)
    mode = form_at(mode, bias is not None)
    check_folds(moments)
    device = moments.gram.device
    wide, kept = weight.detach().to(device, torch.float64), kept.to(device)
    affine = mode in WITH_BIAS
    if mode in ("none", "bias") or len(kept) == wide.shape[1]:
        ladder = [math.inf]
    else:
        ladder = damp_ladder(damp)
    damps = torch.tensor(ladder, dtype=torch.float64, device=device)

    held_out = _cross_validate(wide, moments, kept, damps, affine)
    best = least_held_out(held_out, ladder)
    gram, total, tokens = moments.pooled()
    energy = _energy(wide, gram)
    mean = total / tokens
    if affine:
        gram = centre(gram, total, tokens, mean)
    new, error, _, info = ops.reconstruct(wide, gram, kept, damps[best : best + 1])
    check_solved(info[0, 0], held_out[:, best], ladder[best], damp)
    new_bias = None
    if affine:
        start = wide.new_zeros(len(wide)) if bias is None else bias.detach().to(wide)
        new_bias = start + wide @ mean - new[0] @ mean[kept]
    return Solution(
        weight=new[0],
        bias=new_bias,
        damp=ladder[best],
        error=ratio(error[0], energy),
        holdout_error=ratio(held_out[:, best].sum(), energy),
        condition=float(info[0, 1]),
        path=path_of(mode, ladder[best]),
    )


def drop(weight: Tensor, _: Tensor | None, moments: Moments, kept: Tensor) -> Solution:
    """Keep the columns of one consumer as they are: where a fold has no tokens to choose a λ by.

    Arguments are those of :func:`solve`. Nothing is fitted, so that the error over all tokens is
    held out as well; it is 0 where there are none.
    """
    gram, _, _ = moments.pooled()
    wide, kept = weight.detach().to(gram.device, torch.float64), kept.to(gram.device)
    infinite = gram.new_full((1,), math.inf, dtype=torch.float64)
    new, error, _, _ = ops.reconstruct(wide, gram, kept, infinite)
    lost = ratio(error[0], _energy(wide, gram))
    return Solution(new[0], None, math.inf, lost, lost, 1.0, "drop, a fold has no tokens")


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Return ``tr(W G Wᵀ)``, which is the error of keeping nothing; lower triangle in."""
    nothing = torch.empty(0, dtype=torch.long, device=gram.device)
    drop = gram.new_full((1,), math.inf, dtype=torch.float64)
    return ops.reconstruct(weight, gram, nothing, drop, errors_only=True)[1][0]


def _cross_validate(
    weight: Tensor, moments: Moments, kept: Tensor, damps: Tensor, affine: bool
) -> Tensor:
    """Return the held-out error by fold and damp, ``(2, L)``."""
    pairs = (_fit_and_judge(moments, fold, affine) for fold in range(FOLDS))
    # Folds in one call go side by side where that is sooner, but take copies of the sums.
    groups = zip(pairs) if moments.gram.nbytes > PAIRED_BYTES else [tuple(pairs)]
    held_out = []
    for group in groups:
        grams, holdouts = (
            each[0][None] if len(each) == 1 else torch.stack(each)
            for each in zip(*group, strict=True)
        )
        rows = weight.expand(len(group), -1, -1), kept.expand(len(group), -1)
        result = ops.reconstruct(rows[0], grams, rows[1], damps, holdout=holdouts, errors_only=True)
        held_out.append(result[2])
    return torch.cat(held_out)


def _fit_and_judge(moments: Moments, fold: int, affine: bool) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix of a fold, and that of the other one to judge the fit by."""
    other = FOLDS - 1 - fold
    gram, holdout = moments.gram[fold], moments.gram[other]
    if affine:
        mean = moments.total[fold] / moments.tokens[fold]
        gram = centre(gram, moments.total[fold], moments.tokens[fold], mean)
        holdout = centre(holdout, moments.total[other], moments.tokens[other], mean)
    return gram, holdout
