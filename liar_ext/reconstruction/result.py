"""What the solve of one site returns, and the settings that it may be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import InputError

NOT_FINITE = -2  # a code of `liar_ext.ops.reconstruct`


@dataclass(frozen=True)
class Solution:
    """The new consumer of one site, with its errors.

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
    share : float
        How far the solve went from the consumer's own target, 0, to the target given, 1.
    """

    weight: Tensor
    bias: Tensor | None
    damp: float
    error: float
    holdout_error: float
    condition: float
    path: str
    share: float = 0.0


def least_held_out(errors: Tensor, ladder: Sequence[float]) -> int:
    """Return the index of the λ to take.

    The least sum over the folds counts, of those λ that do no worse than plain dropping in either
    fold: with few tokens a sum may be less by the luck of one.

    Parameters
    ----------
    errors : Tensor
        ``(2, λ)``: held-out error by fold; NaN where nothing could be solved.
    ladder : sequence of float
        The λ; plain dropping, infinity, is the last where it is among them.
    """
    total = errors.sum(0)
    if ladder[-1] == math.inf:
        total = total.masked_fill((errors > errors[:, -1:]).any(0), math.inf)
    return int(total.nan_to_num(nan=math.inf).argmin())


def path_of(mode: str, damp: float) -> str:
    """Return what was solved in a form with the λ that was taken."""
    if damp < math.inf:
        return f"{mode}, cholesky float64"
    return f"{mode}, drop" if mode in ("linear", "affine") else mode


def ratio(error: Tensor, energy: Tensor) -> float:
    """Return ``error / energy``; a consumer whose output is zero has no error to speak of.

    What isn't finite gives NaN, which the report shows, and never 0.
    """
    if not (torch.isfinite(error) and torch.isfinite(energy)):
        return math.nan
    return max(0.0, float(error / energy)) if energy > 0 else 0.0


def check_solved(code: Tensor, held_out: Tensor, damp: float, asked: float | str) -> None:
    """Raise what the code of :func:`liar_ext.ops.reconstruct` means to who gave ``asked``."""
    if code == 0 and torch.isfinite(held_out).all():
        return
    if code == NOT_FINITE or asked == "auto":
        raise InputError(
            "reconstruct: weights must be finite, got a NaN or an infinity in one of them, or "
            "values so large that no damp gives a finite held-out error, not even plain dropping; "
            "load the model in a wider dtype, or leave the site out"
        )
    raise InputError(
        f"reconstruct: G_KK + Λ is not positive definite at damp={damp}; "
        'use damp="auto" or a larger damp'
    )
