"""The operators in plain torch: they serve devices without kernels, and in float64 the tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Products are summed in float32 over CHUNK tokens, in the accumulators of the hardware, and over
# FLUSH tokens by additions that round to nearest; from there on in the dtype of the sums.
CHUNK_TOKENS, FLUSH_TOKENS = 512, 2048
ROW_BLOCK = 256  # of a triangle that is mirrored
PANEL = 1024  # columns of a triangle that are computed at once
PANEL_ROWS = 64  # of L and R that are collected before H and V are updated
LARGEST, LARGEST_FLOAT64 = 2.0**48, 2.0**500  # see `gram_update_` in liar_ext.ops
# Codes of `reconstruct`; the second where values are not waited for.
NOT_FINITE, NOT_ASCENDING = -2.0, -1.0
Results = tuple[Tensor, Tensor, Tensor, Tensor]
# (G_KK, Q, each Λ) to X, code and condition for each.
Solve = Callable[[Tensor, Tensor, Tensor], Iterable[tuple[Tensor, Tensor, Tensor]]]


def gram_update_(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Add the moments of tokens to running sums; see :func:`liar_ext.ops.gram_update_`.

    Half-precision rows are widened unless the device multiplies them into float32.
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
    for start in range(0, right.shape[1], PANEL):
        end = min(start + PANEL, right.shape[1])
        product = _product(left[:, start if triangle else 0 :], right[:, start:end])
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
    solve: Solve | None = None,
) -> Results:
    """Fold the removed features into the weights; see :func:`liar_ext.ops.reconstruct`.

    As csrc/cpu/reconstruct.cpp derives it. Where fewer features go than the layer has outputs, the
    columns of G_KP are the right-hand side, and errors come from traces::

        X = (G_KK + Λ)⁻¹ Q       Q = G_KP or G_KP W_Pᵀ,   V = X S or X,   S = W_Pᵀ W_P
        error    = ⟨S, G_PP⟩ − ⟨V, Q⟩ − Λ ⟨V, X⟩
        held-out = ⟨S, H_PP⟩ − 2 ⟨V, Q_H⟩ + ⟨V, H_KK X⟩

    Dense targets: Q = C_K − G_KK W_Kᵀ, Y = W_Kᵀ + X, error = −⟨Y, C_K + Λ X⟩. Nothing waits for a
    value of a tensor. ``solve`` finds X as :func:`solve_by_library` does.
    """
    optional = holdout, cross, holdout_cross
    results = empty_results(weight, kept, damps, holdout, errors_only)
    if weight.dim() == 3:
        for site in range(len(weight)):
            own = (None if each is None else each[site] for each in optional)
            one = reconstruct(weight[site], gram[site], kept[site], damps, *own, errors_only, solve)
            for stacked, value in zip(results, one, strict=True):
                stacked[site] = value
        return results
    d, n = weight.shape[1], len(kept)
    inside = ((kept >= 0) & (kept < d)).all() & (kept[1:] > kept[:-1]).all()
    read = [each for each in (weight, cross, holdout_cross) if each is not None]
    read += [each.tril() for each in (gram, holdout) if each is not None]
    finite = torch.stack([each.isfinite().all() for each in read]).all()
    before = torch.where(finite, 0.0, NOT_FINITE)
    before = torch.where(inside, before, NOT_ASCENDING).to(torch.float64)
    kept = kept.clamp(0, max(0, d - 1))
    block, side, certify = _prepare(weight.double(), symmetric(gram.double()), kept, optional)
    mean = block.diagonal().mean() if n else block.new_ones(())
    mean = torch.where(mean == 0, 1.0, mean)
    shifts = damps * mean
    found = (solve or solve_by_library)(block, side, shifts)
    for index, (shift, (x, code, condition)) in enumerate(zip(shifts, found, strict=True)):
        new, error, held_out = certify(x, shift, errors_only)
        code = torch.where(before != 0, before, code.to(torch.float64))
        known = error.isfinite() if held_out is None else error.isfinite() & held_out.isfinite()
        code = torch.where((code == 0) & ~known, NOT_FINITE, code)
        values = (new, error, held_out, condition)
        new, error, held_out, condition = (
            None if each is None else torch.where(code == 0, each, math.nan) for each in values
        )
        certified = new, error, held_out, torch.stack([code, condition])
        for result, value in zip(results, certified, strict=True):
            if value is not None:
                result[index] = value
    return results


def empty_results(
    weight: Tensor, kept: Tensor, damps: Tensor, holdout: Tensor | None, errors_only: bool
) -> Results:
    """Return the results of :func:`reconstruct`, to be filled."""
    sites, ladder = weight.shape[:-2], len(damps)

    def empty(*shape: int) -> Tensor:
        return weight.new_empty((*sites, *shape), dtype=torch.float64)

    new = empty(0 if errors_only else ladder, weight.shape[-2], kept.shape[-1])
    return new, empty(ladder), empty(0 if holdout is None else ladder), empty(ladder, 2)


def _prepare(
    weight: Tensor, gram: Tensor, kept: Tensor, optional: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Callable]:
    """Return G_KK, Q, and what gives W' and both errors of an X and its Λ."""
    d = weight.shape[1]
    stays = torch.zeros(d, dtype=torch.int8, device=weight.device).index_fill(0, kept, 1)
    removed = stays.argsort(stable=True)[: d - len(kept)]  # without waiting for how many there are
    held = None if optional[0] is None else symmetric(optional[0].double())
    cross, held_cross = (None if each is None else each.double() for each in optional[1:])
    kept_weight, removed_weight = weight[:, kept].mT, weight[:, removed].mT
    rows, held_rows = gram[kept], None if held is None else held[kept]
    block, held_block = rows[:, kept], None if held is None else held_rows[:, kept]
    turn, metric = None, None  # W_Pᵀ and S, where X is the transfer turned
    lost, held_lost = 0.0, 0.0
    if cross is not None:
        cross = cross[kept]
        side = torch.addmm(cross, block, kept_weight, alpha=-1)
        held_side = None if held_cross is None else held_cross[kept]
    else:
        metric = removed_weight @ removed_weight.mT
        lost, held_lost = (
            0.0 if sums is None else (metric * sums[removed][:, removed]).sum()
            for sums in (gram, held)
        )
        side, held_side = (None if each is None else each[:, removed] for each in (rows, held_rows))
        if len(removed) < len(weight):
            turn = removed_weight
        else:
            metric, side = None, side @ removed_weight
            held_side = None if held_side is None else held_side @ removed_weight

    def certify(x: Tensor, shift: Tensor, errors_only: bool) -> tuple[Tensor | None, ...]:
        drop = shift.isinf()
        shift = torch.where(drop, 0.0, shift)
        if cross is None:
            v = x if metric is None else x @ metric
            error = lost - _dot(v, side) - shift * _dot(v, x)
            error = error.clamp(min=0)  # what rounding took below; a NaN stays one
        else:
            v = x = kept_weight + x
            pulled = torch.where(drop, side, shift * (x - kept_weight))
            error = -_dot(v, cross) - _dot(v, pulled)
        held_out = None
        if held_block is not None:
            held_out = held_lost - 2 * _dot(v, held_side) + _dot(v, held_block @ x)
        if errors_only:
            return None, error, held_out
        new = (x if turn is None else x @ turn).mT
        return new if cross is not None else kept_weight.mT + new, error, held_out

    return block, side, certify


def solve_by_library(
    block: Tensor, side: Tensor, shifts: Tensor
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Yield X = (G_KK + Λ)⁻¹ Q, 0 where Λ is infinite, with code and condition, for each Λ."""
    eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
    for shift in shifts:
        drop = shift.isinf()
        factor, code = torch.linalg.cholesky_ex(torch.where(drop, eye, block + shift * eye))
        x = torch.where(drop, 0.0, torch.cholesky_solve(side, factor))
        yield x, code, condition_of(factor.diagonal())


def condition_of(diagonal: Tensor) -> Tensor:
    """Return a lower bound on the condition of ``L Lᵀ``, from the diagonal of each L."""
    if diagonal.shape[-1] == 0:
        return diagonal.new_ones(diagonal.shape[:-1])
    return (diagonal.amax(-1) / diagonal.amin(-1)) ** 2


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def symmetric(gram: Tensor) -> Tensor:
    """Return the full matrix, or batch of them, of which the lower triangle is given."""
    full = gram.tril()
    for start in range(0, full.shape[-1], ROW_BLOCK):  # by blocks: no second matrix is made
        rows, after = slice(start, start + ROW_BLOCK), slice(start + ROW_BLOCK, None)
        corner = full[..., rows, rows]
        corner += corner.tril(-1).mT
        full[..., rows, after] = full[..., after, rows].mT
    return full


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

    With H = (G_KK + Λ)⁻¹ and V = WᵀW over the features that are left, and S = H_uu = C Cᵀ, to
    remove unit u costs tr N, and is one step of a block Cholesky factorisation::

        L = C⁻¹ H_u:     N = C⁻¹ V_uu C⁻ᵀ     R = C⁻¹ V_u: − ½ N L
        H ← H − LᵀL      V ← V − LᵀR − RᵀL

    Rows of L and R are collected in panels, by :func:`eliminate_panel` or ``eliminate``. Then H and
    V lose the features that went, and products take off the rest. Nothing waits for a value.
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
    """Remove units ``first`` to ``first + count``; return the rows of L and R, and which went."""
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
