"""The operators of :mod:`liar_ext.ops` in plain torch: what the compiled kernels must agree with.

Same signatures, same results, no compiled code. In float64 they are the oracle of the tests. On a
device that has no kernels they do the work: see :mod:`liar_ext.ops.dispatch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Products are summed in float32 over CHUNK tokens, in the accumulators of the hardware, and over
# FLUSH tokens by additions that round to nearest; from there on in the dtype of the sums.
CHUNK_TOKENS, FLUSH_TOKENS = 512, 2048
PANEL = 1024  # columns of a triangle that are computed at once; what they waste is above a diagonal
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

    Products are in float32 (float64 for float64 rows), for which half-precision rows are widened
    unless the device multiplies them into float32. See :func:`liar_ext.ops.gram_update_`.
    """
    use, weights = rows_in_use(gram, count, x, y, weight)
    weighted = weight is not None and weight.dtype != torch.bool
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = not weighted and multiplies_into_float32(x.device.type, x.dtype)
    operand = x.dtype if narrow else compute
    for start in range(0, len(x), FLUSH_TOKENS):
        part = slice(start, start + FLUSH_TOKENS)
        left = torch.where(use[part, None], x[part], 0).to(operand)
        right = left if y is None else torch.where(use[part, None], y[part], 0).to(operand)
        if weighted:
            left = left * weights[part, None].to(operand)
        _add_product(gram, left, right, y is None)
        total += left.sum(0, dtype=torch.float64).to(total.dtype)


def rows_in_use(
    gram: Tensor, count: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return which rows count and their float64 weights, and add to ``count``."""
    weight = x.new_ones(len(x), dtype=torch.float64) if weight is None else weight.double()
    wanted = weight != 0
    largest = LARGEST_FLOAT64 if x.dtype == gram.dtype == torch.float64 else LARGEST
    within = _largest(x) <= largest / weight.clamp(min=1)
    within &= (weight >= 0) & (weight <= largest)
    if y is not None:
        within &= _largest(y) <= largest
    use = wanted & within
    weight = torch.where(use, weight, 0.0)
    count += torch.stack([weight.sum(), (wanted & ~within).sum()])
    return use, weight


@functools.cache
def multiplies_into_float32(device: str, dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies half-precision rows of a device into float32 sums."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        one = torch.ones(16, 16, dtype=dtype, device=device)
        wide = torch.zeros(16, 16, device=device)
        found = torch.addmm(wide, one.mT, one, out_dtype=torch.float32)
        return found.dtype == torch.float32 and bool((found == 16).all())
    except (RuntimeError, TypeError):  # of a device, or of a torch, that cannot
        return False


def _add_product(gram: Tensor, left: Tensor, right: Tensor, triangle: bool) -> None:
    """Add ``leftᵀ right`` by column panels, of a triangle from the diagonal down."""
    columns = right.shape[1]
    for start in range(0, columns, PANEL):
        end = min(start + PANEL, columns)
        top = start if triangle else 0
        product = _product(left[:, top:], right[:, start:end])
        if not triangle:
            gram[:, start:end] += product
            continue
        gram[start:end, start:end] += product[: end - start].tril()
        gram[end:, start:end] += product[end - start :]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``aᵀ b``, rounded to float32 every CHUNK_TOKENS unless the rows are float64."""
    if a.dtype == torch.float64:
        return a.mT @ b
    product = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float32)
    for left, right in zip(a.split(CHUNK_TOKENS), b.split(CHUNK_TOKENS), strict=True):
        if a.dtype == torch.float32:
            product.addmm_(left.mT, right)
        else:
            product = torch.addmm(product, left.mT, right, out_dtype=torch.float32)
    return product


def _largest(x: Tensor) -> Tensor:
    """Return the largest size in each row, NaN if one is in it."""
    wide = torch.float64
    return x.abs().amax(-1).to(wide) if x.shape[1] else x.new_zeros(len(x), dtype=wide)


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
        optional = holdout, cross, holdout_cross
        return each_site(reconstruct, weight, gram, kept, damps, *optional, errors_only)
    weight, gram = weight.double(), symmetric(gram)
    holdout = None if holdout is None else symmetric(holdout)
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
    weight, gram = weight.double(), symmetric(gram)
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


def each_site(
    solve: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    damps: Tensor,
    *others: Tensor | bool | None,
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
        one = solve(weight[site], gram[site], kept[site], damps, *own, errors_only)
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


def symmetric(gram: Tensor) -> Tensor:
    """Return the full float64 matrix of which only the lower triangle is given."""
    return gram.tril().double() + gram.tril(-1).double().mT


def _quadratic(rows: Tensor, gram: Tensor, cross: Tensor | None) -> Tensor:
    """Return ``tr(V G Vᵀ)``, and less ``2 tr(V C)`` if ``cross`` is given."""
    value = ((rows @ gram) * rows).sum()
    return value if cross is None else value - 2 * (rows * cross.mT).sum()
