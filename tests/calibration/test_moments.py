from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from liar_ext import InputError, MomentBank, Moments
from liar_ext.calibration.taps import Squares, all_finite, centre
from liar_ext.system.files import write_tensors


def filled(tokens: int = 40, d_in: int = 7, seed: int = 0) -> tuple[Moments, list]:
    generator = torch.Generator().manual_seed(seed)
    folds = [torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) for _ in range(2)]
    moments = Moments.zeros(d_in)
    for fold, x in enumerate(folds):
        moments.update(x + 1.0, fold)
    return moments, [x + 1.0 for x in folds]


def test_statistics_equal_those_of_the_tokens():
    moments, folds = filled()
    x = torch.cat(folds)
    torch.testing.assert_close(moments.variance(), x.var(0, unbiased=False))
    torch.testing.assert_close(moments.second_moment(), x.square().mean(0))
    gram, total, tokens = moments.pooled()
    torch.testing.assert_close(gram, (x.T @ x).tril())
    assert tokens == 80 and moments.dropped_rows == 0


@pytest.mark.parametrize("own", [True, False])
def test_centring_by_sums_equals_centring_the_tokens(own):
    moments, (a, b) = filled()
    mean = a.mean(0) if own else b.mean(0)
    got = centre(moments.gram[0], moments.total[0], moments.tokens[0], mean)
    torch.testing.assert_close(got.tril(), ((a - mean).T @ (a - mean)).tril())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squares_are_the_diagonal_of_the_moments(dtype):
    """Rows of no weight, and rows with a value that is not finite, are left out of both."""
    both = Moments.zeros(7), Squares.zeros(7)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0] * 8)
    for fold, x in enumerate(filled()[1]):
        x = x.to(dtype)
        x[1], x[2, 3] = torch.nan, torch.inf
        for sums in both:
            sums.update(x, fold, weight)
    moments, squares = both
    diagonal = moments.gram.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(squares.total, diagonal, rtol=1e-5, atol=0)
    assert torch.equal(squares.count, moments.count) and squares.count[0].tolist() == [27.0, 1.0]
    torch.testing.assert_close(squares.second_moment(), moments.second_moment(), rtol=1e-5, atol=0)


def test_what_does_not_merge():
    with pytest.raises(InputError, match="other sums over the same features"):
        filled()[0].merge(Moments.zeros(5))
    itself = filled()[0]
    with pytest.raises(InputError, match="other sums over the same features"):
        itself.merge(itself)
    with pytest.raises(InputError, match="same sites"):
        MomentBank({"0.mlp": Moments.zeros(3)}).merge(MomentBank({"1.mlp": Moments.zeros(3)}))


def test_banks_are_equal_if_their_moments_are():
    one, other, above = (MomentBank({"0.mlp": filled()[0]}) for _ in range(3))
    above["0.mlp"].gram[:, 0, 1] += 1  # which no triangle holds
    assert one == other == above and one != MomentBank() and one["0.mlp"] != 3
    other["0.mlp"].total[0, 0] += 1
    assert one != other


def test_moments_of_other_fold_counts_are_none():
    gram, total, count = (getattr(filled()[0], name) for name in ("gram", "total", "count"))
    for sums in ((gram[:1], total, count), (gram, total[:1], count), (gram, total, count[:, :1])):
        with pytest.raises(InputError, match="sums of 2 folds over the same features"):
            Moments(*sums)


def tensors(d: int = 3) -> dict[str, torch.Tensor]:
    return {
        "0.mlp.gram": torch.ones(2, d * (d + 1) // 2, dtype=torch.float64),
        "0.mlp.total": torch.ones(2, d, dtype=torch.float64),
        "0.mlp.count": torch.ones(2, 2, dtype=torch.float64),
    }


def write(path, sums, **metadata) -> None:
    write_tensors(path, sums, {"liar_bank": "2", "source": "{}", **metadata})


def test_banks_without_fingerprints_are_read(tmp_path):
    write(tmp_path / "bank", tensors())
    bank = MomentBank.load(tmp_path / "bank")
    assert bank["0.mlp"].d_in == 3 and bank.source == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.mlp.gram": None}, "must have gram, total and count"),
        ({"x": torch.ones(1)}, "must have gram, total and count"),
        ({"0.mlp.total": torch.ones(2, 20_000, dtype=torch.float64)}, "must be .*20000"),
        ({"0.mlp.count": torch.ones(3, 2, dtype=torch.float64)}, "must be"),
        ({"0.mlp.count": torch.ones(2, dtype=torch.float64)}, "must be"),
        ({"0.mlp.total": torch.tensor(1.0, dtype=torch.float64)}, "must be"),
        ({"0.mlp.total": torch.ones(2, 3, dtype=torch.int64)}, "must be F64"),
        ({"0.mlp.gram": torch.full((2, 6), torch.nan, dtype=torch.float64)}, "must be finite"),
        ({"0.mlp.gram": torch.full((2, 6), -1.0, dtype=torch.float64)}, "not < 0"),
        ({"0.mlp.count": torch.full((2, 2), -1.0, dtype=torch.float64)}, "not < 0"),
    ],
)
def test_tampered_banks_are_refused(tmp_path, change, message, monkeypatch):
    sums = {name: value for name, value in (tensors() | change).items() if value is not None}
    write(tmp_path / "bank", sums)
    if "nan" not in str(change) and "-1" not in str(change):
        monkeypatch.setattr(torch, "ones", None)  # nothing of that size is made
    with pytest.raises(InputError, match=f"MomentBank.load: .*{message}"):
        MomentBank.load(tmp_path / "bank")


@pytest.mark.parametrize("source", ["[]", "no", "[" * 100_000, '{"tokens": "3"}', '{"tokens": -1}'])
def test_tampered_sources_are_refused(tmp_path, source):
    write(tmp_path / "bank", tensors(), source=source)
    with pytest.raises(InputError, match="not a moment bank"):
        MomentBank.load(tmp_path / "bank")


def test_torn_and_other_files_are_no_bank(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    write(tmp_path / "whole", tensors())
    whole = (tmp_path / "whole").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (tmp_path / f"torn{size}").write_bytes(whole[:size])
    for path in tmp_path.iterdir():
        if path.name != "whole":
            with pytest.raises(InputError, match="not a moment bank"):
                MomentBank.load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_is_seen_wherever_it_is(dtype, bad):
    """Sizes about the width of vector registers, and one that threads would share."""
    for size in (1, 2, 15, 33, 64, 65):
        values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert all_finite(values)
        for at in range(size):
            spoilt = values.clone()
            spoilt[at] = bad
            assert not all_finite(spoilt)
    large = torch.ones(70_001, 3).to(dtype)
    large[-1, 1] = bad
    assert not all_finite(large) and not all_finite(large.T) and all_finite(large[:-1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_has_no_order_in_torch_is_looked_at_too(dtype):
    values = torch.ones(3, 2).to(dtype)
    spoilt = values.clone()
    spoilt[1, 1] = complex(0, math.inf) if dtype.is_complex else math.nan
    assert all_finite(values) and all_finite(values.conj()) and not all_finite(spoilt)


def test_no_values_are_finite():
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.tensor([1, 2]))
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.tensor([largest, -largest]))
