from __future__ import annotations

import pytest
import torch

from liar_ext import InputError, MomentBank, Moments
from liar_ext.calibration.moments import Squares, centre


def filled(tokens: int = 40, d_in: int = 7, seed: int = 0) -> tuple[Moments, list]:
    generator = torch.Generator().manual_seed(seed)
    folds = [torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) for _ in range(2)]
    moments = Moments.zeros(d_in)
    for fold, x in enumerate(folds):
        moments.update(x + 1.0, fold)
    return moments, [x + 1.0 for x in folds]


def test_parts_add_up_to_the_whole():
    whole, (a, b) = filled()
    first, second = Moments.zeros(7), Moments.zeros(7)
    first.update(a[:11], 0)
    second.update(a[11:], 0)
    second.update(b, 1)
    first.merge(second)
    for name in ("gram", "total", "count"):
        torch.testing.assert_close(getattr(first, name), getattr(whole, name))


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


def test_bank_round_trips_and_merges(tmp_path):
    bank = MomentBank({"0.mlp": filled()[0]}, {"model_type": "llama", "tokens": 80})
    bank.save(tmp_path / "bank.safetensors")
    loaded = MomentBank.load(tmp_path / "bank.safetensors")
    assert loaded.source == bank.source and list(loaded) == ["0.mlp"]
    torch.testing.assert_close(loaded["0.mlp"].gram, bank["0.mlp"].gram)
    loaded.merge(bank)
    torch.testing.assert_close(loaded["0.mlp"].gram, 2 * bank["0.mlp"].gram)
    assert loaded.source["tokens"] == 160


def test_what_does_not_merge(tmp_path):
    with pytest.raises(InputError, match="d_in must agree, got 7 and 5"):
        filled()[0].merge(Moments.zeros(5))
    with pytest.raises(InputError, match="same sites"):
        MomentBank({"0.mlp": Moments.zeros(3)}).merge(MomentBank({"1.mlp": Moments.zeros(3)}))


def test_other_files_are_no_bank(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a moment bank"):
        MomentBank.load(tmp_path / "other.safetensors")
