"""`reconstruct` and `obs_curve` the long way, in float64: what every kernel must agree with.

Errors are ``tr(ΔW G ΔWᵀ)`` over all features. The oracle of `gram_update_` is that of
:mod:`liar_ext.ops.reference` in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.ops import dispatch
from liar_ext.ops.reference import NOT_FINITE, condition_of, empty_results, gram_update_, symmetric

__all__ = ["gram_of", "gram_update_", "obs_curve", "problem", "reconstruct"]


def sums(d, cols=None, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over no tokens: gram, total and count."""
    shapes = ((d, cols or d), dtype), ((d,), dtype), ((2,), torch.float64)
    return tuple(torch.zeros(shape, dtype=kind, device=device) for shape, kind in shapes)


def summed(op, x, y=None, weight=None, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `gram_update_`, or a way of it, makes of the sums over no tokens."""
    found = sums(x.shape[1], None if y is None else y.shape[1], dtype)
    op(*found, x, y, weight)
    return found


def by_threads(call, *counts: int) -> list:
    """Return what a call gives with these numbers of threads, one after the other."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def problem(tokens=300, d=40, d_out=6, seed=0) -> tuple[Tensor, Tensor]:
    """Return a weight, and correlated inputs of the layer."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    x = torch.randn(tokens, d, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(d_out, d, generator=generator, dtype=torch.float64), x


def gram_of(x: Tensor) -> Tensor:
    """Return the lower triangle, with NaN above it: whatever reads that is found out."""
    gram = x.mT @ x
    gram[torch.ones_like(gram, dtype=torch.bool).triu(1)] = torch.nan
    return gram


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
    """Fold the removed features into the others; see :func:`liar_ext.ops.reconstruct`."""
    if weight.dim() == 3:
        results = empty_results(weight, kept, damps, holdout, errors_only)
        for site in range(len(weight)):
            own = (None if each is None else each[site] for each in (holdout, cross, holdout_cross))
            one = reconstruct(weight[site], gram[site], kept[site], damps, *own, errors_only)
            for stacked, value in zip(results, one, strict=True):
                stacked[site] = value
        return results
    weight, gram = weight.double(), symmetric(gram.double())
    holdout = None if holdout is None else symmetric(holdout.double())
    cross = None if cross is None else cross.double()
    holdout_cross = None if holdout_cross is None else holdout_cross.double()
    d_out, d = weight.shape
    stays = torch.zeros(d, dtype=torch.bool, device=weight.device)
    stays[kept] = True
    block = gram[kept][:, kept]
    if cross is None:
        rhs = gram[kept][:, ~stays] @ weight[:, ~stays].mT
    else:
        rhs = cross[kept] - block @ weight[:, kept].mT
    mean = block.diagonal().mean() if len(kept) else gram.new_ones(())
    mean = torch.where(mean == 0, 1.0, mean)
    arguments = (weight, gram, holdout, cross, holdout_cross)
    finite = all(one is None or bool(torch.isfinite(one).all()) for one in arguments)

    results = []
    for damp in damps:
        change, code, condition = _solve(block, damp * mean, rhs)
        new = weight[:, kept] + change.mT
        full = torch.zeros_like(weight) if cross is not None else -weight
        full[:, kept] = new if cross is not None else change.mT
        error = _quadratic(full, gram, cross)
        held_out = None if holdout is None else _quadratic(full, holdout, holdout_cross)
        results.append(_unless_spoilt(finite, new, error, held_out, code, condition))
    if not results:
        empty = weight.new_empty(0)
        return weight.new_empty(0, d_out, len(kept)), empty, empty.clone(), weight.new_empty(0, 2)
    new, error, held_out, info = zip(*results, strict=True)
    return (
        weight.new_empty(0, d_out, len(kept)) if errors_only else torch.stack(new),
        torch.stack(error),
        weight.new_empty(0) if holdout is None else torch.stack(held_out),
        torch.stack(info),
    )


def _solve(block: Tensor, shift: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(block + shift)⁻¹ rhs``, the code of the factorisation and its condition."""
    one = block.new_ones(())
    if torch.isinf(shift) or len(block) == 0:
        return torch.zeros_like(rhs), torch.zeros_like(one), one
    eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
    factor, code = torch.linalg.cholesky_ex(block + shift * eye)
    if code != 0:
        return torch.full_like(rhs, torch.nan), code.to(rhs.dtype), one * torch.nan
    diagonal = factor.diagonal()
    condition = (diagonal.max() / diagonal.min()) ** 2
    return torch.cholesky_solve(rhs, factor), code.to(rhs.dtype), condition


def _unless_spoilt(
    finite: bool, new: Tensor, error: Tensor, held_out: Tensor | None, code: Tensor, cond: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the result for one λ; NaNs with a code where it can't be one."""
    errors = (error, error if held_out is None else held_out)
    if not finite or (code == 0 and not all(bool(torch.isfinite(one)) for one in errors)):
        code = torch.full_like(code, NOT_FINITE)
    if code != 0:
        new, error, cond = (torch.full_like(one, torch.nan) for one in (new, error, cond))
        held_out = None if held_out is None else torch.full_like(held_out, torch.nan)
    return new, error, held_out, torch.stack([code, cond])


def _quadratic(rows: Tensor, gram: Tensor, cross: Tensor | None) -> Tensor:
    """Return ``tr(V G Vᵀ)``, and less ``2 tr(V C)`` if ``cross`` is given."""
    value = ((rows @ gram) * rows).sum()
    return value if cross is None else value - 2 * (rows * cross.mT).sum()


def obs_curve(
    weight: Tensor, gram: Tensor, width: int, damp: float, at_least: int, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the cheapest unit again and again; see :func:`liar_ext.ops.obs_curve`.

    Keeps the re-solved weights and ``(G_KK + Λ)⁻¹`` themselves, and downdates both unit by unit.
    """
    weight, gram = weight.double(), symmetric(gram.double())
    d = len(gram)
    units, removed = d // width, d // width - at_least
    diagonal = gram.diagonal()
    weight = torch.where(diagonal == 0, 0.0, weight)
    mean = torch.where(diagonal.mean() > 0, diagonal.mean(), 1.0)
    factor, code = torch.linalg.cholesky_ex(
        gram + damp * mean * torch.eye(d, dtype=gram.dtype, device=gram.device)
    )
    condition = condition_of(factor.diagonal())
    inverse = torch.cholesky_inverse(torch.where(code == 0, factor, torch.nan))

    features = torch.arange(d, device=gram.device).view(units, width)
    group = torch.arange(units, device=gram.device) // (units // groups)
    gone = torch.zeros(units, dtype=torch.bool, device=gram.device)
    order, cost = [], [gram.new_zeros(())]
    for k in range(removed):
        if k % groups == 0:
            lost = torch.zeros(groups, dtype=torch.bool, device=gram.device)
        blocks = inverse[features[:, :, None], features[:, None, :]]
        blocks[gone] = torch.eye(width, dtype=gram.dtype, device=gram.device)
        roots = torch.linalg.cholesky_ex(blocks).L
        columns = weight.mT.reshape(units, width, -1)
        costs = torch.linalg.solve_triangular(roots, columns, upper=False).square().sum((1, 2))
        costs = torch.where(gone | lost[group], torch.inf, costs)
        unit = costs.argmin()
        at = features[unit]
        # Not `solve`, which raises where NaNs have made the block singular: the cost tells.
        step = torch.linalg.solve_ex(inverse[at][:, at], inverse[at]).result
        weight = weight - weight[:, at] @ step
        inverse = inverse - inverse[:, at] @ step
        gone[unit], lost[group[unit]] = True, True
        order.append(unit)
        cost.append(costs[unit])
    failed = (code != 0) | ~torch.stack(cost).isfinite().all()
    code = torch.where(failed & (code == 0), d + 1, code).to(gram.dtype)
    found = torch.stack(order) if order else features.new_empty(0)
    return (
        torch.where(failed, torch.arange(removed, device=gram.device), found),
        torch.where(failed, torch.nan, torch.stack(cost).cumsum(0)),
        torch.stack([code, torch.where(failed, torch.nan, condition)]),
    )


def same(got, want, dtype):
    """Tell whether sums are equal bit for bit; those of a BLAS, which does not promise it, nearly.

    ``dtype`` is that of the rows. Halves are multiplied in float32.
    """
    if not dispatch.MISSING:
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return all(
        (a - b).abs().max() <= 64 * eps * b.abs().max() for a, b in zip(got, want, strict=True)
    )


def by_states(p: Tensor, q: Tensor, counted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the divergence of states, at tokens that are counted, and of means by a mask."""
    mask = torch.ones_like(counted) if mask is None else mask

    def relative(p: Tensor, q: Tensor) -> Tensor:
        return 0.5 * (p - q).square().sum(-1) / p.square().sum(-1)

    means = [(each * mask[..., None]).sum(1) / mask.sum(1)[:, None] for each in (p, q)]
    return (counted * (relative(p, q) + relative(*means)[:, None])).sum()
