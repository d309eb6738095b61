"""``reconstruct`` by ``torch.linalg``: on CUDA that is cuSOLVER and cuBLAS, in float64.

The formulas are those of csrc/cpu/reconstruct.cpp, which derives them. Where fewer features go than
the layer has outputs, the columns of G_KP are the right-hand side, ``r = min(d_out, n_P)`` of them,
and errors come from traces::

    X = (G_KK + Λ)⁻¹ Q       Q = G_KP or G_KP W_Pᵀ,   V = X S or X,   S = W_Pᵀ W_P
    error    = ⟨S, G_PP⟩ − ⟨V, Q⟩ − Λ ⟨V, X⟩
    held-out = ⟨S, H_PP⟩ − 2 ⟨V, Q_H⟩ + ⟨V, H_KK X⟩

Dense targets: Q = C_K − G_KK W_Kᵀ, Y = W_Kᵀ + X, error = −⟨Y, C_K + Λ X⟩. Nothing waits for a value
of a tensor, so the calls can be captured into a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.ops.reference import NOT_FINITE, each_site, symmetric

NOT_ASCENDING = -1.0  # a code of `reconstruct` where values are not waited for


@dataclass
class Site:
    """What does not depend on λ."""

    block: Tensor  # G_KK
    held: Tensor | None  # H_KK
    side: Tensor  # Q
    held_side: Tensor | None  # Q_H, or C_H of the kept features
    kept_weight: Tensor  # W_Kᵀ
    removed_weight: Tensor | None  # W_Pᵀ, where X is the transfer turned
    metric: Tensor | None  # S, there too
    cross: Tensor | None  # C_K
    removed_error: Tensor | float = 0.0
    removed_held: Tensor | float = 0.0


def reconstruct(
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    damps: Tensor,
    holdout: Tensor | None = None,
    cross: Tensor | None = None,
    holdout_cross: Tensor | None = None,
    errors_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold the removed features into the weights; see :func:`liar_ext.ops.reconstruct`."""
    optional = holdout, cross, holdout_cross
    if weight.dim() == 3:
        return each_site(reconstruct, weight, gram, kept, damps, *optional, errors_only)
    d, n = weight.shape[1], len(kept)
    inside = ((kept >= 0) & (kept < d)).all() & (kept[1:] > kept[:-1]).all()
    finite = torch.stack(
        [one.isfinite().all() for one in (weight, cross, holdout_cross) if one is not None]
        + [one.tril().isfinite().all() for one in (gram, holdout) if one is not None]
    ).all()
    before = torch.where(finite, 0.0, NOT_FINITE)
    before = torch.where(inside, before, NOT_ASCENDING).to(torch.float64)
    kept = kept.clamp(0, max(0, d - 1))
    stays = torch.zeros(d, dtype=torch.int8, device=weight.device).index_fill(0, kept, 1)
    removed = stays.argsort(stable=True)[: d - n]  # without waiting for how many there are
    wide = (None if one is None else one.double() for one in (cross, holdout_cross))
    held = None if holdout is None else symmetric(holdout)
    site = _prepare(weight.double(), symmetric(gram), held, kept, removed, *wide)

    mean = site.block.diagonal().mean() if n else site.block.new_ones(())
    mean = torch.where(mean == 0, 1.0, mean)
    eye = torch.eye(n, dtype=torch.float64, device=weight.device)
    results = [_solve(site, eye, damp, damp * mean, before, errors_only) for damp in damps]
    new, error, held_out, info = zip(*results, strict=True) if results else ([],) * 4
    ladder = len(results)

    def stack(parts: list[Tensor], *shape: int) -> Tensor:
        empty = weight.new_empty(shape, dtype=torch.float64)
        return torch.stack(list(parts)).contiguous() if 0 not in shape[:1] else empty

    return (
        stack(new, 0 if errors_only else ladder, len(weight), n),
        stack(error, ladder),
        stack(held_out, 0 if holdout is None else ladder),
        stack(info, ladder, 2),
    )


def _prepare(
    weight: Tensor,
    gram: Tensor,
    held: Tensor | None,
    kept: Tensor,
    removed: Tensor,
    cross: Tensor | None,
    held_cross: Tensor | None,
) -> Site:
    kept_weight, removed_weight = weight[:, kept].mT, weight[:, removed].mT
    rows = gram[kept]
    block = rows[:, kept]
    held_rows = None if held is None else held[kept]
    held_block = None if held is None else held_rows[:, kept]
    if cross is not None:
        cross = cross[kept]
        side = torch.addmm(cross, block, kept_weight, alpha=-1)
        held_side = None if held_cross is None else held_cross[kept]
        return Site(block, held_block, side, held_side, kept_weight, None, None, cross)
    metric = removed_weight @ removed_weight.mT
    transfer = len(removed) < len(weight)

    def right(rows: Tensor) -> Tensor:
        return rows[:, removed] if transfer else rows[:, removed] @ removed_weight

    return Site(
        block,
        held_block,
        right(rows),
        None if held is None else right(held_rows),
        kept_weight,
        removed_weight if transfer else None,
        metric if transfer else None,
        None,
        (metric * gram[removed][:, removed]).sum(),
        0.0 if held is None else (metric * held[removed][:, removed]).sum(),
    )


def _solve(
    site: Site, eye: Tensor, damp: Tensor, shift: Tensor, before: Tensor, errors_only: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Return W', the errors, and the code with the condition for one λ."""
    drop = damp.isinf()
    shift = torch.where(drop, 0.0, shift)
    factor, code = torch.linalg.cholesky_ex(torch.where(drop, eye, site.block + shift * eye))
    x = torch.where(drop, 0.0, torch.cholesky_solve(site.side, factor))
    if site.cross is None:
        v = x if site.metric is None else x @ site.metric
        error = site.removed_error - _dot(v, site.side) - shift * _dot(v, x)
        error = error.clamp(min=0)  # what rounding took below; a NaN stays one
    else:
        v = x = site.kept_weight + x
        pulled = torch.where(drop, site.side, shift * (x - site.kept_weight))
        error = -_dot(v, site.cross) - _dot(v, pulled)
    held_out = None
    if site.held is not None:
        held_out = site.removed_held - 2 * _dot(v, site.held_side) + _dot(v, site.held @ x)
    diagonal = factor.diagonal()
    condition = error.new_ones(())
    if len(diagonal):
        condition = (diagonal.max() / diagonal.min()) ** 2
    code = torch.where(before != 0, before, code.to(torch.float64))
    known = error.isfinite() if held_out is None else error.isfinite() & held_out.isfinite()
    code = torch.where((code == 0) & ~known, NOT_FINITE, code)

    def unless_failed(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.where(code == 0, value, math.nan)

    new = None
    if not errors_only:
        new = x.mT if site.cross is not None else site.kept_weight.mT + _change(site, x)
    return (
        unless_failed(new),
        unless_failed(error),
        unless_failed(held_out),
        torch.stack([code, unless_failed(condition)]),
    )


def _change(site: Site, x: Tensor) -> Tensor:
    return x.mT if site.removed_weight is None else (x @ site.removed_weight).mT


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
