"""The CUDA kernels, on the host, at the edge of their arithmetic and on what is no number."""

import numpy as np
import pytest
from host_kernels import DTYPES, kernels, narrow

pytestmark = pytest.mark.exhaustive

LIMIT = 2.0**48


@pytest.fixture(autouse=True)
def unchanged():
    kernels().configure()
    yield


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


D, D_OUT = 70, 5
LADDER = np.array([0.0, 1e-3, np.inf])


def problem(targets, rng):
    x, z = rng.standard_normal((2, 200, D))
    arguments = {
        "weight": rng.standard_normal((1, D_OUT, D)),
        "gram": (x.T @ x)[None],
        "holdout": (z.T @ z)[None],
    }
    if targets:
        arguments["cross"] = (x.T @ rng.standard_normal((200, D_OUT)))[None]
        arguments["holdout_cross"] = (z.T @ rng.standard_normal((200, D_OUT)))[None]
    return arguments


def solve(arguments, kept):
    return kernels().reconstruct(
        arguments["weight"],
        arguments["gram"],
        np.tile(kept, (len(arguments["weight"]), 1)),
        LADDER,
        arguments["holdout"],
        arguments.get("cross"),
        arguments.get("holdout_cross"),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("targets", [False, True])
def test_no_argument_may_hold_a_nan(targets, bad):
    arguments = problem(targets, np.random.default_rng(0))
    kept = np.arange(0, D, 2)
    for name in arguments:
        rows, cols = arguments[name].shape[1:]
        for place in ((rows - 1, cols - 1), (rows - 1, 0), (rows // 2, 1)):
            spoilt = {**arguments, name: arguments[name].copy()}
            spoilt[name][0][place] = bad
            weight, error, held_out, info = solve(spoilt, kept)
            assert np.isnan(weight).all() and np.isnan(error).all() and np.isnan(held_out).all()
            assert (info[..., 0] == -2).all() and np.isnan(info[..., 1]).all()


@pytest.mark.parametrize("fold", ["gram", "holdout"])
def test_an_error_beyond_float64_is_no_error(fold):
    arguments = problem(False, np.random.default_rng(1))
    arguments["weight"] = arguments["weight"] * 1e100
    arguments[fold] = arguments[fold] * 1e150
    _, error, held_out, info = solve(arguments, np.arange(0, D, 2))
    assert np.isnan(error).all() and np.isnan(held_out).all()
    assert (info[..., 0] == -2).all() and np.isnan(info[..., 1]).all()


def test_the_upper_triangle_is_not_read_and_one_bad_item_spoils_no_other():
    one = problem(False, np.random.default_rng(2))
    arguments = {name: np.concatenate([a, a, a]) for name, a in one.items()}
    kept = np.arange(0, D, 2)
    want = solve(arguments, kept)
    arguments["gram"][:, np.triu(np.ones((D, D), bool), 1)] = np.nan
    arguments["gram"][1, 9, 3] = np.nan
    got = solve(arguments, kept)
    for mine, clean in zip(got, want, strict=True):
        assert np.array_equal(mine[[0, 2]], clean[[0, 2]])
    assert np.isnan(got[1][1]).all() and (got[3][1, :, 0] == -2).all()


def test_units_beyond_the_height_of_a_grid_go_in_slices():
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((7, 45)), rng.standard_normal((60, 45))
    want = kernels().obs_curve(weight, x.T @ x, 3, 0.1)
    for most in (1, 4, 15):
        got = kernels().obs_curve(weight, x.T @ x, 3, 0.1, most_batches=most)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
