"""gram_update_ near the edge of its arithmetic: rows beyond it are dropped and counted."""

import pytest
import torch
from oracle import same, summed

from liar_ext import ops
from liar_ext.ops import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LIMIT = 2.0**48
INF = float("inf")


def both(*arguments, **settings):
    """Return what the operator gives, which must be finite and about what the reference gives."""
    got = summed(ops.gram_update_, *arguments, **settings)
    want = summed(reference.gram_update_, *arguments, **settings)
    assert all(tensor.isfinite().all() for tensor in got)
    assert torch.equal(got[2], want[2])
    for mine, theirs in zip(got, want, strict=True):
        scale = theirs.abs().max()
        assert (mine - theirs).abs().max() <= 1e-5 * scale
    return got


def rows(tokens=300, d=129, dtype=torch.float32):
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2e19, -3e38, 4e14])
@pytest.mark.parametrize("column", [0, 63, 128])
def test_a_huge_finite_row_is_dropped_and_counted(dtype, size, column):
    x = rows(dtype=dtype)
    x[[0, 7, 299], column] = size
    gram, total, count = both(x)
    assert count.tolist() == [297, 3]
    good = torch.ones(300, dtype=torch.bool)
    good[[0, 7, 299]] = False
    clean = summed(ops.gram_update_, x[good])
    assert same((gram, total), clean[:2], dtype)


def test_rows_that_cancel_are_seen():
    """The sum of a column is finite and small; its products are not."""
    x = rows(8, 16)
    x[2, 5], x[3, 5] = 2e19, -2e19
    assert both(x)[2].tolist() == [6, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gram", [torch.float32, torch.float64], ids=str)
def test_many_rows_of_the_largest_size_add_up(dtype, gram):
    x = torch.full((5000, 24), LIMIT, dtype=torch.float64).to(dtype)
    x[::2, 3] *= -1
    got = both(x, dtype=gram)
    assert got[2].tolist() == [5000, 0]
    assert abs(got[0][0, 0] / (5000 * LIMIT**2) - 1) < 1e-6


@pytest.mark.parametrize("gram", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1 + 2**-7, 1e100])
def test_float64_rows_have_the_limit_of_the_sums(gram, scale):
    x = rows(dtype=torch.float64)
    x[4, 4] = LIMIT * scale
    assert both(x, dtype=gram)[2][1] == (1 if gram == torch.float32 else 0)
    x[5, 5] = 1e200
    assert both(x, dtype=gram)[2][1] == (2 if gram == torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_counts_with_its_weight(dtype):
    x = rows(50, 33, dtype)
    weight = torch.ones(50, dtype=torch.float64)
    x[2, 2], weight[2] = 60000.0, 2.0**40  # within, each by itself
    weight[3], weight[4], weight[5] = 2.0**49, 1e300, 2.0**47
    x[3], x[4], x[5] = 0.0, 0.0, 1.0
    wide = dtype == torch.float64
    assert both(x, weight=weight)[2][1] == (0 if wide else 3) + (0 if not wide else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_the_limit_holds_for_y(dtype, kind):
    x, y = rows(70, 9, dtype), rows(70, 40, dtype)
    y[6, 39], x[7, 0], x[8, 8] = 1e15, 1e15, INF
    weight = None if kind is None else torch.ones(70, dtype=kind)
    if weight is not None:
        weight[7] = 0  # not looked at
    assert both(x, y, weight)[2][1] == (3 if weight is None else 2)


def test_a_false_zero():
    """One such token made the sums infinite, and both errors of a reconstruction 0."""
    x = rows(400, 12)
    x[17, 3] = 2e19
    gram = both(x)[0]
    kept = torch.arange(0, 12, 2)
    damps = torch.tensor([1e-3], dtype=torch.float64)
    _, error, _, info = ops.reconstruct(torch.ones(2, 12), gram, kept, damps)
    assert info[0, 0] == 0 and error[0] > 1
