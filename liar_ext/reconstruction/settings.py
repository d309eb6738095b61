"""The settings that a reconstruction may be asked for."""

from __future__ import annotations

import math

from liar_ext.errors import InputError

MODES = ("auto", "none", "bias", "linear", "affine")
WITH_BIAS = ("bias", "affine")
DAMP_LADDER = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 3e-1, 1.0, math.inf)


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


def form_of_expert(mode: str, has_bias: bool) -> str:
    """Return the mode of one expert's consumer: without a bias, the form that needs none."""
    return mode if has_bias else {"affine": "linear", "bias": "none"}.get(mode, mode)


def damp_ladder(damp: float | str) -> list[float]:
    """Return the λ to choose from."""
    return list(DAMP_LADDER) if damp == "auto" else [float(damp)]
