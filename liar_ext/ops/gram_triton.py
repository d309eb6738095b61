"""A Gram update as one Triton kernel, from Ampere to Blackwell; imported only where Triton is.

Each program computes one tile of the lower triangle, or of a cross-Gram matrix. Tokens that do not
count are masked where rows are loaded, so they may hold anything::

    tokens k ──▶ a: (k, m), b: (k, n) ──▶ part += aᵀ b ──every PROMOTE──▶ whole ──▶ gram += whole

Tensor cores truncate when they accumulate. So ``part`` stays short, 512 tokens of 16 bits, and
joins ``whole`` by an addition that rounds to nearest. A launch takes 2048 tokens: what it adds to
``gram`` is right to float32, and the error of a long calibration does not grow.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from liar_ext.ops.reference import CHUNK_TOKENS, FLUSH_TOKENS, rows_in_use

# The interpreter multiplies bfloat16 as if it were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
BAND = tl.constexpr(8)  # tile rows that programs in flight share operands of, in L2


@triton.jit
def _row_of(index):
    """Return the row of an element of a lower triangle that is stored row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def _triangular_tile(index, tile_rows):
    """Return row and column of a tile: bands of rows, column by column, then their triangles."""
    first = _row_of(index) // BAND * BAND
    height = tl.minimum(BAND, tile_rows - first)
    index -= first * (first + 1) // 2
    rest = index - first * height
    row = _row_of(tl.maximum(rest, 0))
    below = rest < 0
    at_row = tl.where(below, index % height, row)
    return first + at_row, tl.where(below, index // height, first + rest - row * (row + 1) // 2)


@triton.jit
def _halves(tile):
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def _add(gram, stride, tile, m, start, d, columns, TRIANGLE: tl.constexpr):
    """Add a slice of a tile to the sums, of a triangle from the diagonal down."""
    n = start + tl.arange(0, tile.shape[1])
    inside = (m < d)[:, None] & (n < columns)[None, :]
    if TRIANGLE:
        inside &= m[:, None] >= n[None, :]
    at = gram + m.to(tl.int64)[:, None] * stride + n[None, :]
    old = tl.load(at, mask=inside, other=0.0)
    tl.store(at, old + tile.to(old.dtype), mask=inside)


@triton.jit
def product_kernel(
    x,
    y,
    use,
    weight,
    gram,
    tokens,
    d,
    columns,
    x_stride,
    y_stride,
    gram_stride,
    TRIANGLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    PROMOTE: tl.constexpr,
    SUM: tl.constexpr,
):
    """Gram += xᵀ diag(w) y for at most FLUSH_TOKENS tokens."""
    index = tl.program_id(0)
    tile_rows = tl.cdiv(d, SIZE)
    if TRIANGLE:
        row, column = _triangular_tile(index, tile_rows)
    else:
        row, column = index % tile_rows, index // tile_rows
    m = row * SIZE + tl.arange(0, SIZE)
    n = column * SIZE + tl.arange(0, SIZE)
    part = tl.zeros((SIZE, SIZE), dtype=SUM)
    whole = tl.zeros((SIZE, SIZE), dtype=SUM)
    for step in range(0, tl.cdiv(tokens, DEPTH)):
        k = step * DEPTH + tl.arange(0, DEPTH)
        keep = tl.load(use + k, mask=k < tokens, other=0) != 0
        at = k.to(tl.int64)[:, None]
        a = tl.load(
            x + at * x_stride + m[None, :], mask=keep[:, None] & (m < d)[None, :], other=0.0
        )
        b = tl.load(
            y + at * y_stride + n[None, :], mask=keep[:, None] & (n < columns)[None, :], other=0.0
        )
        if WEIGHTED:
            w = tl.load(weight + k, mask=k < tokens, other=0.0).to(SUM)
            a = a.to(SUM) * w[:, None]
            b = b.to(SUM)
        if INTERPRETED:
            a, b = a.to(SUM), b.to(SUM)
        part = tl.dot(tl.trans(a), b, part, input_precision="tf32x3", out_dtype=SUM)
        if step % PROMOTE == PROMOTE - 1:
            whole += part
            part = tl.zeros((SIZE, SIZE), dtype=SUM)
    whole += part
    quarter: tl.constexpr = SIZE // 4
    first, second = _halves(whole)
    start = column * SIZE
    for half in tl.static_range(2):
        one, other = _halves(first if half == 0 else second)
        _add(gram, gram_stride, one, m, start, d, columns, TRIANGLE)
        _add(gram, gram_stride, other, m, start + quarter, d, columns, TRIANGLE)
        start += 2 * quarter


@triton.jit
def sum_kernel(x, weight, total, tokens, d, x_stride, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """Total += xᵀ w in float64; a row of weight 0 may hold anything."""
    m = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    sums = tl.zeros((SIZE,), dtype=tl.float64)
    for start in range(0, tokens, DEPTH):
        k = start + tl.arange(0, DEPTH)
        w = tl.load(weight + k, mask=k < tokens, other=0.0)
        at = x + k.to(tl.int64)[:, None] * x_stride + m[None, :]
        a = tl.load(at, mask=(w != 0)[:, None] & (m < d)[None, :], other=0.0)
        sums += tl.sum(a.to(tl.float64) * w[:, None], 0)
    old = tl.load(total + m, mask=m < d, other=0.0)
    tl.store(total + m, (old + sums).to(old.dtype), mask=m < d)


def settings(dtype: torch.dtype, weighted: bool) -> dict:
    """Return the tile of a product, and what the compiler is told."""
    if dtype == torch.float64:
        tile = {"SIZE": 64, "DEPTH": 16, "PROMOTE": 1 << 20, "SUM": tl.float64, "num_warps": 4}
    elif dtype == torch.float32 or weighted:
        # 3×TF32: each part is rounded, as a short one is right to 2⁻²¹ and a long one is not.
        tile = {"SIZE": 128, "DEPTH": 16, "PROMOTE": 1, "SUM": tl.float32, "num_warps": 8}
    else:
        tile = {"SIZE": 128, "DEPTH": 64, "SUM": tl.float32, "num_warps": 8}
        tile["PROMOTE"] = CHUNK_TOKENS // tile["DEPTH"]
    return tile | {"num_stages": 3, "enable_fp_fusion": True}


def gram_update_(gram, total, count, x, y=None, weight=None) -> None:
    """Add to the sums as :func:`liar_ext.ops.gram_update_` does."""
    use, weights = rows_in_use(gram, count, x, y, weight)
    weighted = weight is not None and weight.dtype != torch.bool
    x = x if x.stride(1) == 1 else x.contiguous()
    right = x if y is None else y if y.stride(1) == 1 else y.contiguous()
    tile = settings(x.dtype, weighted)
    (tokens, d), columns = x.shape, right.shape[1]
    rows, right_columns = triton.cdiv(d, tile["SIZE"]), triton.cdiv(columns, tile["SIZE"])
    tiles = rows * (rows + 1) // 2 if y is None else rows * right_columns
    if tiles == 0 or tokens == 0:
        return
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for start in range(0, tokens, FLUSH_TOKENS):
            part = slice(start, start + FLUSH_TOKENS)
            product_kernel[(tiles,)](
                *(x[part], right[part], use[part], weights[part], gram),
                *(min(FLUSH_TOKENS, tokens - start), d, columns),
                *(x.stride(0), right.stride(0), gram.stride(0)),
                TRIANGLE=y is None,
                WEIGHTED=weighted,
                **tile,
            )
        sum_kernel[(triton.cdiv(d, 64),)](
            x, weights, total, tokens, d, x.stride(0), SIZE=64, DEPTH=64
        )
