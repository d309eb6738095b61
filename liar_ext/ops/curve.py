"""``obs_curve`` in plain torch: what serves CUDA, and every device without kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.ops.reference import condition_of, symmetric

PANEL_ROWS = 64  # of L and R that are collected before H and V are updated


@dataclass
class Elimination:
    """What is left, and what went; named as in :func:`obs_curve`."""

    h: Tensor  # (n, n) of the features that are left
    v: Tensor
    unit: Tensor  # (n / width,) ascending: the units that they are of
    lost: Tensor  # (groups,) the round in which each group lost its last unit, or -1
    order: Tensor  # (removed,)
    error: Tensor  # (removed + 1,)
    width: int
    per_group: int  # units of a group, in the beginning


def obs_curve(
    weight: Tensor,
    gram: Tensor,
    width: int,
    damp: float,
    at_least: int,
    groups: int = 1,
    eliminate: Callable[[Elimination, int, int], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the cheapest unit again and again; see :func:`liar_ext.ops.obs_curve`.

    Two symmetric matrices over the features that are left say everything, H = (G_KK + Λ)⁻¹ and
    V = WᵀW of the re-solved weights W. With S = H_uu = C Cᵀ, to remove unit u costs tr N, and is
    one step of a block Cholesky factorisation::

        L = C⁻¹ H_u:     N = C⁻¹ V_uu C⁻ᵀ     R = C⁻¹ V_u: − ½ N L
        H ← H − LᵀL      V ← V − LᵀR − RᵀL

    Rows of L and R are collected in panels. Then H and V close their ranks: they lose the features
    that went, and products take off the rest. ``eliminate`` makes a panel, as :func:`eliminate`
    does. Nothing waits for a value of a tensor.
    """
    gram = symmetric(gram.double())
    d, diagonal = len(gram), gram.diagonal()
    units, removed = d // width, d // width - at_least
    weight = torch.where(diagonal == 0, 0.0, weight.double())
    mean = diagonal.mean()
    diagonal += damp * torch.where(mean > 0, mean, 1.0)
    factor, code = torch.linalg.cholesky_ex(gram)
    del gram, diagonal
    condition = condition_of(factor.diagonal())
    factor = torch.where(code == 0, factor, torch.nan)
    unit = torch.arange(units, device=weight.device)
    left = Elimination(
        h=torch.cholesky_inverse(factor).mT.contiguous(),  # symmetric, and column by column
        v=weight.mT @ weight,
        unit=unit,
        lost=torch.full_like(unit[:groups], -1),
        order=torch.arange(removed, device=weight.device),
        error=weight.new_zeros(removed + 1),
        width=width,
        per_group=units // groups,
    )
    del factor
    at_once = max(1, PANEL_ROWS // width)
    for first in range(0, removed, at_once):
        count = min(at_once, removed - first)
        panel = (eliminate or eliminate_panel)(left, first, count)
        if first + count < removed:
            _close_ranks(left, *panel, count)
    failed = (code != 0) | ~left.error.isfinite().all()
    code = torch.where(failed & (code == 0), d + 1, code).to(torch.float64)
    return (
        torch.where(failed, torch.arange(removed, device=weight.device), left.order),
        torch.where(failed, torch.nan, left.error),
        torch.stack([code, torch.where(failed, torch.nan, condition)]),
    )


def eliminate_panel(s: Elimination, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Remove units ``first`` to ``first + count``; return the rows of L and R, and which went.

    H and V stay as they are. Only their diagonal blocks are kept up to date, for the costs.
    """
    w, groups, group = s.width, len(s.lost), s.unit // s.per_group
    at = torch.arange(len(s.h), device=s.h.device).view(-1, w)
    inner, energy = (m[at[:, :, None], at[:, None, :]] for m in (s.h, s.v))
    rows = torch.zeros(2, count * w, len(s.h), dtype=s.h.dtype, device=s.h.device)
    gone = torch.zeros_like(s.unit, dtype=torch.bool)
    for k in range(count):
        step = first + k
        root = _inverse_roots(inner)
        square = root @ energy @ root.mT
        cost = square.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)
        closed = gone | (s.lost[group] == step // groups)
        cost = torch.where(cost.isfinite() & ~closed, cost, torch.inf)
        slot = cost.argmin(0, keepdim=True)  # the first of equal ones
        own = at[slot][0]
        (left, right), new = rows[:, : k * w], rows[:, k * w : (k + 1) * w]
        l_u, r_u = left[:, own].mT, right[:, own].mT
        new[0] = root[slot][0] @ (s.h[own] - l_u @ left)
        new[1] = root[slot][0] @ (s.v[own] - l_u @ right - r_u @ left)
        new[1] -= square[slot][0] / 2 @ new[0]
        l_of, r_of = new.view(2, w, -1, w).transpose(1, 2)  # by unit
        crossed = l_of.mT @ r_of
        inner, energy = inner - l_of.mT @ l_of, energy - crossed - crossed.mT
        gone.index_fill_(0, slot, True)
        s.lost.index_fill_(0, group[slot], step // groups)
        s.order[step : step + 1] = s.unit[slot]
        s.error[step + 1 : step + 2] = s.error[step] + cost[slot]
    return *rows, gone


def _inverse_roots(blocks: Tensor) -> Tensor:
    """Return C⁻¹ of each block C Cᵀ, NaN where it is not positive definite."""
    if blocks.shape[-1] == 1:
        return blocks.rsqrt()
    root, code = torch.linalg.cholesky_ex(blocks)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    return torch.where(code[:, None, None] == 0, inverse, torch.nan)


def _close_ranks(s: Elimination, left: Tensor, right: Tensor, gone: Tensor, count: int) -> None:
    """Take a panel of ``count`` units off H and V, over the features that stay."""
    stays = gone.to(torch.int8).argsort(stable=True)[: len(gone) - count]
    at = (stays[:, None] * s.width + torch.arange(s.width, device=stays.device)).flatten()
    left, right = left[:, at], right[:, at]
    s.h = s.h[at[:, None], at].addmm_(left.mT, left, alpha=-1)
    # One product of twice the depth: it is reading and writing V that costs.
    both, turned = torch.cat([left, right]), torch.cat([right, left])
    s.v = s.v[at[:, None], at].addmm_(both.mT, turned, alpha=-1)
    s.unit = s.unit[stays]
