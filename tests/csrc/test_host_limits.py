"""The CUDA kernels, on the host, at the edge of their arithmetic and on what is no number."""

import numpy as np
import pytest
from host_kernels import DTYPES, kernels, narrow

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("unchanged")]

LIMIT = 2.0**48


def moments(x, dtype, y=None, weight=None, gram_dtype=np.float64, limit=LIMIT):
    cols = x.shape[1] if y is None else y.shape[1]
    gram, total = np.zeros((x.shape[1], cols), gram_dtype), np.zeros(x.shape[1], gram_dtype)
    count = np.zeros(2)
    kernels().gram_update_(gram, total, count, x, y, weight, dtype, 3, limit)
    return gram, total, count


def rows(tokens, d, dtype, seed=0):
    return narrow(np.random.default_rng(seed).standard_normal((tokens, d)), dtype)


def put(x, dtype, at, value):
    x[at] = narrow(np.array([value]), dtype)[0]


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("value", [2e19, -3e38, 4e14])
@pytest.mark.parametrize("d", [40, 33])  # with and without loads of 16 bytes
def test_a_huge_finite_row_is_dropped_and_counted(dtype, value, d):
    x = rows(70, d, dtype)
    for at in ((0, 0), (9, 32), (69, d - 1)):
        put(x, dtype, at, value)
    good = np.ones(70, bool)
    good[[0, 9, 69]] = False
    got, want = moments(x, dtype), moments(np.ascontiguousarray(x[good]), dtype)
    assert got[2].tolist() == [67, 3]
    assert all(np.array_equal(a, b) for a, b in zip(got[:2], want[:2], strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
def test_rows_of_the_largest_size_add_up(dtype):
    x = narrow(np.full((2100, 8), LIMIT), dtype)
    gram, total, count = moments(x, dtype, gram_dtype=np.float32)
    assert count.tolist() == [2100, 0]
    assert np.isfinite(gram).all() and np.isfinite(total).all()
    assert abs(gram[0, 0] / (2100 * LIMIT**2) - 1) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_counts_with_its_weight(dtype):
    x, weight = rows(50, 33, dtype), np.ones(50)
    put(x, dtype, (2, 2), 60000.0)
    weight[2] = 2.0**40  # within, each by itself
    weight[3], weight[4], weight[5] = 2.0**49, 1e300, 2.0**44
    x[3], x[4] = 0, 0
    x[5] = narrow(np.array([1.0]), dtype)[0]
    gram, total, count = moments(x, dtype, weight=weight)
    assert count[1] == 3 and np.isfinite(gram).all() and np.isfinite(total).all()


def test_the_limit_holds_for_y_and_is_the_callers():
    x, y = rows(70, 9, "f64"), rows(70, 40, "f64")
    y[6, 39], x[7, 0], y[8, 8] = 1e15, 1e140, np.inf
    assert moments(x, "f64", y)[2].tolist() == [67, 3]
    gram, _, count = moments(x, "f64", y, limit=2.0**500)
    assert count.tolist() == [69, 1] and np.isfinite(gram).all()
