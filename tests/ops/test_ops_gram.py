"""gram_update_ against the float64 oracle, closed forms and awkward inputs."""

import pytest
import torch
from covers import cover
from oracle import by_threads, same, summed, sums

from liar_ext import ops
from liar_ext.ops import dispatch, reference

needs_extension = pytest.mark.skipif(bool(dispatch.MISSING), reason="what torch does not promise")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOKENS = [0, 1, 7, 129, 600]
FEATURES = [1, 7, 48, 129]


def rows(tokens, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, d, generator=generator).to(dtype)


def weights(tokens, kind):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(tokens, generator=generator) > 0.3
    if kind == "none":
        return None
    if kind == "bool":
        return mask
    return torch.rand(tokens, generator=generator).to(getattr(torch, kind)) * mask


def assert_like_torch(x, got, y=None, weight=None):
    """At most twice the error of plain float32 torch, plus one ulp of scale.

    The scale of a sum is the sum of magnitudes: what cancels was rounded before it did. For float64
    rows there is no wider oracle, so the sums may differ by their rounding: by √tokens, as a walk
    of single roundings does.
    """
    wide = None if y is None else y.double()
    exact = summed(reference.gram_update_, x.double(), wide, weight)
    plain = summed(reference.gram_update_, x, y, weight)
    scales = summed(
        reference.gram_update_, x.double().abs(), None if y is None else wide.abs(), weight
    )
    double = x.dtype == torch.float64
    ulp = torch.finfo(torch.float64 if double else torch.float32).eps
    ulp *= max(8, len(x) ** 0.5) if double else 1
    for value, oracle, torch_value, scale in zip(got, exact, plain, scales, strict=True):
        if value.numel() == 0:
            continue
        allowed = 2 * (torch_value - oracle).abs().max() + ulp * scale.max()
        assert (value - oracle).abs().max() <= allowed


@cover(2, dtype=DTYPES, tokens=TOKENS, d=FEATURES, kind=["none", "bool", "float32", "float64"])
def test_gram_matches_the_oracle(dtype, tokens, d, kind):
    x, weight = rows(tokens, d, dtype), weights(tokens, kind)
    assert_like_torch(x, summed(ops.gram_update_, x, weight=weight), weight=weight)


@cover(
    2,
    dtype=DTYPES,
    shape=[(1, 1), (7, 129), (129, 7), (200, 200)],
    kind=["none", "bool", "float32"],
)
def test_cross_gram_matches_the_oracle(dtype, shape, kind):
    d, cols = shape
    x, y, weight = rows(300, d, dtype), rows(300, cols, dtype, seed=5), weights(300, kind)
    assert_like_torch(x, summed(ops.gram_update_, x, y, weight), y, weight)


@cover(2, dtype=DTYPES, tokens=[9, 130, 700], d=[576, 1537])  # in strips and in blocks
def test_wide_gram_matches_the_oracle(d, tokens, dtype):
    x = rows(tokens, d, dtype)
    assert_like_torch(x, summed(ops.gram_update_, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [70, 4500])  # in strips and in blocks
def test_upper_triangle_is_neither_read_nor_written(dtype, tokens):
    x = rows(tokens, 129, dtype)
    gram, total, count = sums(129)
    gram[torch.ones_like(gram, dtype=torch.bool).triu(1)] = torch.nan
    gram[torch.ones_like(gram, dtype=torch.bool).tril()] = 0
    ops.gram_update_(gram, total, count, x)
    assert gram[torch.ones_like(gram, dtype=torch.bool).triu(1)].isnan().all()
    assert torch.equal(gram.tril().nan_to_num(), summed(ops.gram_update_, x)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_columns_equal_contiguous(dtype):
    wide = rows(130, 300, dtype)
    for view in (wide[:, :129], wide[::2, 3:132], wide.T[:129].T, wide.T[:100, :90]):
        expected = summed(ops.gram_update_, view.contiguous())
        assert same(summed(ops.gram_update_, view), expected, dtype)
    y = wide.T[:130, :60]
    got, want = summed(ops.gram_update_, wide, y), summed(ops.gram_update_, wide, y.contiguous())
    assert same(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_not_read(dtype):
    x, weight = rows(129, 33, dtype), weights(129, "bool")
    dirty = torch.where(weight[:, None], x, torch.tensor(torch.nan, dtype=dtype))
    got, want = summed(ops.gram_update_, dirty, weight=weight), summed(ops.gram_update_, x[weight])
    assert same(got, want, dtype)
    assert got[2].tolist() == [int(weight.sum()), 0]


@cover(2, dtype=DTYPES, bad=[torch.nan, torch.inf, -torch.inf], column=[0, 30, 63, 64, 128])
def test_rows_that_are_not_finite_are_dropped_and_counted(dtype, bad, column):
    x = rows(300, 129, dtype)
    spoilt = torch.tensor([0, 5, 256, 299])
    good = torch.ones(300, dtype=torch.bool)
    good[spoilt] = False
    dirty = x.clone()
    dirty[spoilt, column] = bad
    got = summed(ops.gram_update_, dirty)
    assert got[2].tolist() == [296, 4]
    assert_like_torch(x[good], (got[0], got[1], got[2].new_tensor([296, 0])))
    cross = summed(ops.gram_update_, x, dirty)
    assert cross[2].tolist() == [296, 4]
    assert cross[0].isfinite().all()


def test_float16_overflow_is_dropped_and_the_largest_value_is_not():
    x = torch.ones(4, 3)
    x[1, 1], x[2, 2] = 70000.0, 65504.0
    gram, total, count = summed(ops.gram_update_, x.half())
    assert count.tolist() == [3, 1]
    assert abs(gram[2, 2] - (65504.0**2 + 2)) <= 1e-7 * 65504.0**2
    assert total.tolist() == [3, 3, 65506]


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_bad_weights_are_dropped_and_counted(bad):
    x, weight = rows(9, 4, torch.float32), torch.ones(9)
    weight[3], weight[4] = bad, 0.0
    got = summed(ops.gram_update_, x, weight=weight)
    keep = [0, 1, 2, 5, 6, 7, 8]
    assert got[2].tolist() == [7, 1]
    assert torch.equal(got[0], summed(ops.gram_update_, x[keep])[0])


def test_subnormal_float16_is_exact():
    x = torch.tensor([[2.0**-24, 2.0**-20], [2.0**-15, -(2.0**-24)]], dtype=torch.float16)
    gram, total, _ = summed(ops.gram_update_, x)
    assert torch.equal(gram, (x.double().T @ x.double()).tril())
    assert torch.equal(total, x.double().sum(0))


def test_small_integers_are_exact_in_every_dtype():
    x = torch.randint(-8, 9, (1000, 65), generator=torch.Generator().manual_seed(3))
    exact = (x.T @ x).tril().double()
    for dtype in DTYPES:
        gram, total, count = summed(ops.gram_update_, x.to(dtype))
        assert torch.equal(gram, exact)
        assert torch.equal(total, x.sum(0).double())
        assert count.tolist() == [1000, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_add_up(dtype):
    x = rows(4096, 50, dtype)
    whole, parts = summed(ops.gram_update_, x), sums(50)
    for piece in x.split(2048):
        ops.gram_update_(*parts, piece)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_sums(dtype):
    x = rows(300, 129, dtype)
    got = summed(ops.gram_update_, x, dtype=torch.float32)
    want = summed(ops.gram_update_, x)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_whatever_the_threads(dtype):
    x, weight = rows(3000, 200, dtype), weights(3000, "float32")
    first, *others = by_threads(lambda: summed(ops.gram_update_, x, weight=weight), 1, 2, 2, 3)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("tokens", [10**3, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_does_not_grow_with_tokens(tokens, dtype):
    """At most twice the error of torch's own float32 product of the whole batch."""
    d = 16
    generator = torch.Generator().manual_seed(9)
    x = (torch.rand(tokens, d, generator=generator) + 0.5).to(dtype)  # sums that grow: hard
    exact = (x.double().T @ x.double()).tril()
    single = x.float()
    torch_error = ((single.T @ single).double().tril() - exact).abs().max()
    error = (summed(ops.gram_update_, x)[0] - exact).abs().max()
    assert error <= 2 * torch_error + torch.finfo(torch.float32).eps * exact.max()
    assert error <= 2e-6 * exact.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fewer_tokens_than_features_stay_definite_at_the_least_damping(dtype):
    gram = summed(ops.gram_update_, rows(1024, 1088, dtype))[0]
    full = gram + gram.tril(-1).mT
    assert torch.linalg.eigvalsh(full)[0] >= -5e-7 * full.diagonal().mean()  # the least λ is 1e-6


def test_rejected_arguments_name_the_rule_and_the_remedy():
    gram, total, count = sums(4)
    x = torch.zeros(3, 4)
    cases = [
        ((gram, total, count, torch.zeros(2, 3, 4)), "flatten batch and sequence first"),
        ((gram, total, count, torch.zeros(3, 5)), r"x must be \(tokens, 4\), got \(3, 5\)"),
        ((gram, total, count, x.int()), "x must be float16"),
        ((gram[:2], total, count, x), r"gram must be \(4, 4\), got \(2, 4\)"),
        ((gram.mT[:, :], total, count, x), "contiguous columns"),
        ((gram.float(), total, count, x), "both be float32 or both be float64"),
        ((gram, total, count.float(), x), r"count must be \(2,\) float64"),
        ((gram, total, count, x, torch.zeros(2, 4)), r"y must be \(3, dy\)"),
        ((gram, total, count, x, torch.zeros(3, 4).double()), "y must have the dtype of x"),
        ((gram, total, count, x, None, torch.ones(2)), r"weight must be \(3,\), got \(2,\)"),
        ((gram, total, count, x, None, torch.ones(3).half()), "weight must be bool"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match="gram_update_: .*" + message):
            ops.gram_update_(*arguments)
    assert not gram.any() and not total.any() and not count.any()
