"""gram_update_ as the GPU would run it, executed on the host against float64."""

import numpy as np
import pytest
from host_kernels import DTYPES, guarded, kernels, narrow, widen

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("unchanged")]

SHAPES = [(0, 5), (1, 1), (7, 7), (33, 129), (129, 8), (200, 300), (1, 256), (70, 64)]


def random(rng, tokens, width, dtype):
    return narrow(rng.standard_normal((tokens, width)), dtype)


def run(x, dtype, y=None, weight=None, gram_dtype=np.float64, start=0.0, processors=3):
    width = x.shape[1] if y is None else y.shape[1]
    gram = np.full((x.shape[1], width), start, gram_dtype)
    total = np.full(x.shape[1], start, gram_dtype)
    count = np.zeros(2)
    kernels().gram_update_(gram, total, count, x, y, weight, dtype, processors)
    return gram, total, count


def expected(x, y=None, weight=None):
    wide = widen(x)
    right = wide if y is None else widen(y)
    w = np.ones(len(x)) if weight is None else weight.astype(np.float64)
    good = np.isfinite(wide).all(1) & np.isfinite(right).all(1) & np.isfinite(w) & (w >= 0)
    kept = good & (w > 0)
    wide, right, w = wide[kept], right[kept], w[kept]
    gram = wide.T @ (right * w[:, None])
    scale = np.abs(wide).T @ (np.abs(right) * w[:, None])
    return (np.tril(gram) if y is None else gram), wide.T @ w, w.sum(), scale


def tolerance(dtype, tokens):
    # Sums of products that are exact (16 bit) or right to 2^-21, in float32: one truncation for
    # each 16 tokens, at most 128 of them before the sum moves on, or one rounding for each 8.
    return {"f64": 1e-14, "f32": 2**-20, "bf16": 2**-17, "f16": 2**-17}[dtype]


def check(x, dtype, **arguments):
    start, gram_dtype = 2.0, arguments.pop("gram_dtype", np.float64)
    processors = arguments.pop("processors", 3)
    gram, total, count = run(
        x, dtype, start=start, gram_dtype=gram_dtype, processors=processors, **arguments
    )
    want, sums, weight_sum, scale = expected(x, **arguments)
    dropped = count[1]
    bound = tolerance(dtype, len(x)) * scale + np.finfo(gram_dtype).eps * (np.abs(want) + start)
    lower = np.ones_like(want, bool) if arguments.get("y") is not None else np.tri(len(want)) > 0
    assert np.all(np.abs(gram - start - want)[lower] <= bound[lower])
    assert np.all(gram[~lower] == start), "the upper triangle is not ours to write"
    np.testing.assert_allclose(total - start, sums, rtol=1e-5, atol=1e-5 * (1 + len(x) ** 0.5))
    np.testing.assert_allclose(count[0], weight_sum, rtol=1e-14)
    return dropped


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(dtype, shape):
    x = random(np.random.default_rng(1), *shape, dtype)
    assert check(x, dtype) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [np.bool_, np.float32, np.float64])
def test_weights_and_bad_rows(dtype, kind):
    rng = np.random.default_rng(2)
    x = random(rng, 77, 40, dtype)
    weight = (rng.random(77) * (rng.random(77) > 0.4)).astype(kind)
    bad = narrow(np.array([np.nan]), dtype)[0]
    weight[:6] = 1
    x[0, 39] = x[5, 0] = bad
    weight[8] = 0
    x[8] = bad  # of weight 0: never looked at
    expect = 2
    if kind != np.bool_:
        weight[9], weight[10], weight[11] = -1, np.nan, np.inf
        expect = 5
    assert check(x, dtype, weight=weight) == expect


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_moments(dtype):
    rng = np.random.default_rng(3)
    x, y = random(rng, 90, 70, dtype), random(rng, 90, 133, dtype)
    y[4, 132] = narrow(np.array([np.nan]), dtype)[0]
    assert check(x, dtype, y=y) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [5, 24])
def test_strided_rows_between_nans(dtype, extra):
    # 24 extra elements keep rows of 16-bit floats on 16-byte boundaries, 5 do not.
    x = guarded(random(np.random.default_rng(4), 50, 40, dtype), extra)
    assert check(x, dtype) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_gram(dtype):
    x = random(np.random.default_rng(5), 65, 33, dtype)
    assert check(x, dtype, gram_dtype=np.float32) == 0


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("processors", [1, 8])
def test_long_and_split_over_tokens(dtype, processors):
    # 2500 tokens pass the point where the float32 sums move on; eight processors split them in two.
    rng = np.random.default_rng(6)
    x = random(rng, 2500, 24, dtype)
    assert check(x, dtype, processors=processors, weight=rng.random(2500) > 0.2) == 0


def test_all_rows_skipped_or_dropped():
    x = random(np.random.default_rng(7), 40, 9, "f16")
    assert check(x, "f16", weight=np.zeros(40, np.bool_)) == 0
    x[:, 3] = np.inf
    assert check(x, "f16") == 40


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_bitwise_repeatable_in_any_order(dtype):
    x = random(np.random.default_rng(8), 2200, 30, dtype)
    first = run(x, dtype, processors=8)
    for order, late in [(1, True), (7, False)]:
        kernels().configure(order=order, late_copies=late)
        again = run(x, dtype, processors=8)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 29])
def test_every_tile_once(rows):
    order = kernels().tile_order(rows, -1)
    assert sorted(order) == [(i, j) for i in range(rows) for j in range(i + 1)]
    order = kernels().tile_order(rows, 5)
    assert sorted(order) == [(i, j) for i in range(rows) for j in range(5)]


def listing(tokens, kept):
    weight = np.zeros(tokens, np.bool_)
    weight[np.linspace(0, tokens - 1, kept).astype(int)] = True
    return weight


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
def test_every_barrier_and_wait_is_needed_and_its_loss_seen(dtype):
    # Several tiles follow each other in one block, and the last stage of one is (200 tokens), or
    # its last copies are (180), among the first stages of the next; lists are long.
    rng = np.random.default_rng(9)
    width = 264 if dtype != "f64" else 132
    jobs = [
        (random(rng, 200, width, dtype), None),
        (random(rng, 180, width, dtype), None),
        (random(rng, 17000, 3, dtype), listing(17000, 300)),
    ]
    kernels().configure()
    right = [run(x, dtype, weight=w, processors=1) for x, w in jobs]
    sites = kernels().synchronization_sites()
    assert any("product.cuh" in s for s in sites) and any("gram.cuh" in s for s in sites)

    def survives(site):
        for order, late in [(0, True), (1, False), (5, False), (6, True)]:
            for (x, w), want in zip(jobs, right, strict=True):
                kernels().configure(order=order, late_copies=late, removed={site})
                got = run(x, dtype, weight=w, processors=1)
                if not all(np.array_equal(a, b) for a, b in zip(want, got, strict=True)):
                    return False
        return True

    assert [s for s in sorted(sites) if survives(s)] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_fragment_is_seen(dtype):
    x = random(np.random.default_rng(10), 32, 16, dtype)
    right = run(x, dtype)[0]
    kernels().configure(swapped_fragments=True)
    assert not np.array_equal(run(x, dtype)[0], right)


def test_sums_of_many_tokens_are_hardly_too_small():
    """Tensor cores truncate: 2048 tokens in one accumulator lose four times what 512 do."""
    x = random(np.random.default_rng(8), 2048, 32, "bf16")
    gram, _, _ = run(x, "bf16", processors=1)
    exact = np.square(widen(x)).sum(0)
    lost = ((np.diag(gram) - exact) / exact).mean()
    assert -1e-6 < lost < -1e-7


def test_fewer_tokens_than_features_leave_the_least_eigenvalue_near_zero():
    """A diagonal that is too small, by more than the rest, is not definite at λ = 1e-6.

    Here the least eigenvalue is -2.7e-7 of the mean diagonal, and -4.3e-7 with 1024 tokens in one
    accumulator.
    """
    x = random(np.random.default_rng(8), 1024, 1088, "bf16")
    gram, _, _ = run(x, "bf16", processors=1)
    full = np.tril(gram) + np.tril(gram, -1).T
    assert np.linalg.eigvalsh(full)[0] >= -3.4e-7 * np.trace(full) / len(full)
