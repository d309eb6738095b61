"""What the solve of one site returns, and the settings that it may be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from liar_ext.errors import InputError

MODES = ("auto", "none", "bias", "linear", "affine")
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


def check_settings(mode: str, damp: float | str) -> None:
    """Raise InputError unless ``mode`` and ``damp`` are ones that :func:`solve` knows."""
    if mode not in MODES:
        raise InputError(f"reconstruct: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if damp != "auto" and not (isinstance(damp, float | int) and damp >= 0):
        raise InputError(f'reconstruct: damp must be "auto" or a number >= 0, got {damp!r}')


def form_at(mode: str, has_bias: bool) -> str:
    """Return the mode of one consumer: ``auto`` is affine where there is a bias to carry it."""
    if mode == "auto":
        return "affine" if has_bias else "linear"
    return mode


def damp_ladder(damp: float | str) -> list[float]:
    """Return the λ to choose from."""
    return list(DAMP_LADDER) if damp == "auto" else [float(damp)]


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


def ratio(error: Tensor, energy: Tensor) -> float:
    """Return ``error / energy``; a consumer whose output is zero has no error to speak of."""
    return max(0.0, float(error / energy)) if energy > 0 else 0.0
