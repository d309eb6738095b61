"""The operators of :mod:`liar_ext.ops` in plain torch: what the compiled kernels must agree with.

Same signatures, same results, no compiled code. In float64 they are the oracle of the tests; on a
device that the extension has no kernels for they do the work if ``LIAR_REFERENCE=1`` asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_TOKENS = 256
LARGEST, LARGEST_FLOAT64 = 2.0**48, 2.0**500  # see `gram_update_` in liar_ext.ops
NOT_FINITE = -2.0  # a code of `reconstruct`


def gram_update_(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Add ``xᵀ diag(w) (y or x)``, ``xᵀ w`` and ``[Σ w, rows dropped]`` to the sums.

    Products are in float32 (float64 for float64 rows) within ``CHUNK_TOKENS`` tokens; chunks are
    added up in the dtype of ``gram``. See :func:`liar_ext.ops.gram_update_`.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = x.new_ones(len(x), dtype=torch.float64) if weight is None else weight.double()
    wanted = weight != 0
    largest = LARGEST_FLOAT64 if x.dtype == gram.dtype == torch.float64 else LARGEST
    within = (x.abs() <= largest / weight.clamp(min=1)[:, None]).all(-1)
    within &= (weight >= 0) & (weight <= largest)
    if y is not None:
        within &= (y.abs() <= largest).all(-1)
    use = wanted & within
    weight = torch.where(use, weight, 0.0)
    count += torch.stack([weight.sum(), (wanted & ~within).sum()])
    for start in range(0, len(x), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        left = torch.where(use[part, None], x[part], 0).to(compute)
        right = left if y is None else torch.where(use[part, None], y[part], 0).to(compute)
        scaled = left * weight[part, None].to(compute)
        product = (scaled.mT @ right).to(gram.dtype)
        gram += product.tril() if y is None else product
        total += scaled.sum(0, dtype=torch.float64).to(total.dtype)


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
    """Fold the removed features into the weights that stay; see :func:`liar_ext.ops.reconstruct`.

    The errors are computed the long way, as ``tr(ΔW G ΔWᵀ)`` over all features.
    """
    if weight.dim() == 3:
        return _each_site(weight, gram, kept, damps, holdout, cross, holdout_cross, errors_only)
    weight, gram = weight.double(), _symmetric(gram)
    holdout = None if holdout is None else _symmetric(holdout)
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


def obs_curve(
    weight: Tensor, gram: Tensor, width: int, damp: float, at_least: int, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the cheapest unit again and again; see :func:`liar_ext.ops.obs_curve`.

    Keeps the re-solved weights and ``(G_KK + Λ)⁻¹`` themselves, and downdates both unit by unit.
    """
    weight, gram = weight.double(), _symmetric(gram)
    d = len(gram)
    units, removed = d // width, d // width - at_least
    diagonal = gram.diagonal()
    weight = torch.where(diagonal == 0, 0.0, weight)
    mean = torch.where(diagonal.mean() > 0, diagonal.mean(), 1.0)
    factor, code = torch.linalg.cholesky_ex(
        gram + damp * mean * torch.eye(d, dtype=gram.dtype, device=gram.device)
    )
    condition = (factor.diagonal().max() / factor.diagonal().min()) ** 2
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


def _each_site(
    weight: Tensor, gram: Tensor, kept: Tensor, damps: Tensor, *others: Tensor | bool | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reconstruct site by site, and stack what comes of it."""
    *optional, errors_only = others
    ladder, held_out = len(damps), 0 if optional[0] is None else len(damps)
    shapes = (0 if errors_only else ladder, weight.shape[1], kept.shape[1]), (ladder,), (held_out,)
    results = tuple(
        weight.new_empty(len(weight), *shape, dtype=torch.float64)
        for shape in (*shapes, (ladder, 2))
    )
    for site in range(len(weight)):
        own = (None if tensor is None else tensor[site] for tensor in optional)
        one = reconstruct(weight[site], gram[site], kept[site], damps, *own, errors_only)
        for stacked, value in zip(results, one, strict=True):
            stacked[site] = value
    return results


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


def _symmetric(gram: Tensor) -> Tensor:
    """Return the full float64 matrix of which only the lower triangle is given."""
    return gram.tril().double() + gram.tril(-1).double().mT


def _quadratic(rows: Tensor, gram: Tensor, cross: Tensor | None) -> Tensor:
    """Return ``tr(V G Vᵀ)``, and less ``2 tr(V C)`` if ``cross`` is given."""
    value = ((rows @ gram) * rows).sum()
    return value if cross is None else value - 2 * (rows * cross.mT).sum()
