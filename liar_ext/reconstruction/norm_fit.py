"""What a norm over fewer features puts out, and what is lost of what it put out before.

With h the stream and K the features that stay, ``v = norm_K(h_K)`` is what the narrowed norm gives
with the weights it had, and ``x = norm(h)`` what the dense one gives. Both are functions of a token
and not of each other, so that moments are taken of ``[v; x]``, ``n_kept + hidden`` features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.moments import Moments, symmetric
from liar_ext.reconstruction.ridge import Solution, ratio


def lost_moments(both: Moments, kept: Tensor, slope: Tensor, offset: Tensor) -> Moments:
    """Return the moments of ``[x'; r]`` from those of ``[v; x]``.

    ``x' = slope ∘ v + offset``; ``r = x`` less x' on the features K that it stands for.

    Parameters
    ----------
    both : Moments
        Of ``n_kept + hidden`` features.
    kept : Tensor
        K, ``(n_kept,)`` int64.
    slope, offset : Tensor
        ``(n_kept,)`` float64.
    """
    n = len(kept)
    gram, total = symmetric(both.gram), both.total.clone()
    gram[:, :n] *= slope[:, None]
    gram[:, :, :n] *= slope
    total[:, :n] *= slope
    # Σ (u + c)(u + c)ᵀ, with c the offset on the first n features.
    tokens = both.tokens[:, None, None]
    gram[:, :n] += offset[:, None] * total[:, None, :]
    gram[:, :, :n] += total[:, :, None] * offset
    gram[:, :n, :n] += tokens * torch.outer(offset, offset)
    total[:, :n] += both.tokens[:, None] * offset
    gram[:, n + kept] -= gram[:, :n]
    gram[:, :, n + kept] -= gram[:, :, :n]
    total[:, n + kept] -= total[:, :n]
    return Moments(gram, total, both.count)


def fit_norm(both: Moments, kept: Tensor, with_offset: bool) -> tuple[Tensor, Tensor, Solution]:
    """Fit scale and offset of each feature of a narrowed norm to what the dense norm puts out.

    ``min Σ_t (s_j v_jt + c_j − x_jt)²`` for every j in K, with v what the norm puts out over K.

    Parameters
    ----------
    both : Moments
        Of ``[v; x]``.
    kept : Tensor
        K, ``(n_kept,)`` int64.
    with_offset : bool
        Whether the norm has a bias to carry c.

    Returns
    -------
    slope, offset : Tensor
        s and c, ``(n_kept,)`` float64.
    solution : Solution
        What is left of x, removed features included, relative to ``Σ |x|²``.
    """
    n = len(kept)
    here = torch.arange(n, device=kept.device)
    square = both.gram[:, here, here]
    cross = both.gram[:, n + kept, here]
    energy = both.gram.diagonal(dim1=1, dim2=2)[:, n:].sum(1)
    v, x, tokens = both.total[:, :n], both.total[:, n + kept], both.tokens[:, None]
    wanted = both.gram[:, n + kept, n + kept]

    def fit(fold: Tensor) -> tuple[Tensor, Tensor]:
        count = tokens[fold].sum()
        mean, goal = v[fold].sum(0) / count, x[fold].sum(0) / count
        if not with_offset:
            mean, goal = torch.zeros_like(mean), torch.zeros_like(goal)
        spread = square[fold].sum(0) - count * mean.square()
        together = cross[fold].sum(0) - count * mean * goal
        # A feature without spread has no slope to fit.
        slope = torch.where(spread > 1e-12 * square[fold].sum(0), together / spread, 1.0)
        return slope, goal - slope * mean

    def error(fold: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        """Return Σ (s v + c − x)² over K, and Σ x² over P."""
        left = slope.square() * square + tokens * offset.square() + wanted
        left += 2 * (slope * offset * v - slope * cross - offset * x)
        return (left.sum(1) + energy - wanted.sum(1))[fold].sum()

    whole = torch.arange(FOLDS, device=kept.device)
    slope, offset = fit(whole)
    held_out = sum(error(whole[1 - f : 2 - f], *fit(whole[f : f + 1])) for f in range(FOLDS))
    solution = Solution(
        weight=slope,
        bias=offset,
        damp=0.0,
        error=ratio(error(whole, slope, offset), energy.sum()),
        holdout_error=ratio(held_out, energy.sum()),
        condition=1.0,
        path="norm only, least squares",
    )
    return slope, offset, solution
