"""What a sample counts by its timestep, where a diffusion transformer is calibrated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liar_ext.errors import InputError


def timestep_weights(
    timestep: Tensor, *, last: float = 1000.0, steps: int = 25, low: float = 0.8, high: float = 1.2
) -> Tensor:
    """Return the weights of samples by their timesteps, for the ``weight`` of a batch.

    The noisier a sample is, the more it counts, as errors of early denoising steps add up::

        w = low + (high - low) · ln(1 + (steps - 1) · timestep / last) / ln(steps)

    Of ``steps`` evenly spread timesteps these are the weights of OBS-Diff, which decrease as the
    logarithm of the steps that are left.

    Parameters
    ----------
    timestep : Tensor
        ``(batch,)``, as the model takes it: 0 is no noise, ``last`` noise alone.
    last : float
        1000 for DiT and SD3, 1 for Flux and Qwen-Image.
    steps : int
        Denoising steps of the pipeline that the model is for, 2 at least.
    low, high : float
        Weights of the last step and of the first.

    Returns
    -------
    Tensor
        ``(batch,)`` float64.

    Raises
    ------
    InputError
        If a timestep isn't in [0, last], there are fewer than two steps, or a weight isn't above 0.

    Notes
    -----
    Source: OBS-Diff (arXiv 2510.06751), logarithmic-decrease weighting, with its defaults.
    """
    if steps < 2 or not 0 < low or not 0 < high:
        raise InputError(
            f"timestep_weights: steps must be 2 at least, low and high above 0, got {steps}, {low} "
            f"and {high}; 25, 0.8 and 1.2 are the defaults"
        )
    part = timestep.double() / last
    if not bool(((part >= 0) & (part <= 1)).all()):
        raise InputError(
            f"timestep_weights: timesteps must be in [0, {last:g}], got {timestep.tolist()}; give "
            "last=1 for Flux and Qwen-Image, 1000 for DiT and SD3"
        )
    return low + (high - low) * torch.log1p((steps - 1) * part) / math.log(steps)
