"""The walk down a ladder of λ against brute force."""

from __future__ import annotations

import math

import pytest
import torch

from liar_ext.reconstruction.ladder import (
    ROW_BLOCK,
    Equations,
    Fit,
    choose,
    factor_in_place,
    half_product,
    rows_of,
    substitute,
)

SIZES = [1, 3, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 90]
LADDER = [1e-3, 1e-2, 1e-1, math.inf]


def positive(n, seed=0):
    x = torch.randn(2 * n + 5, n, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x


@pytest.mark.parametrize("n", SIZES)
def test_a_factor_solves_what_torch_solves(n):
    square, right = positive(n), torch.randn(n, 7).double()
    factor, solution = square.clone(), right.clone()
    assert factor_in_place(factor)
    assert torch.allclose(factor.tril(), torch.linalg.cholesky(square), rtol=1e-9, atol=1e-9)
    factor += torch.full_like(factor, math.nan).triu(1)  # only the lower triangle is read
    substitute(factor, solution)
    substitute(factor, solution, back=True)
    assert torch.allclose(solution, torch.linalg.solve(square, right), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("at", [0, ROW_BLOCK - 1, ROW_BLOCK + 40])
def test_what_is_not_positive_definite_has_no_factor(at):
    square = positive(ROW_BLOCK + 41)
    square[at, at] = -1.0
    assert not factor_in_place(square)


@pytest.mark.parametrize("n", SIZES)
def test_half_of_a_product_is_enough(n):
    square, right = positive(n), torch.randn(n, 5).double()
    half = half_product(rows_of(square), right)
    whole = right.T @ square @ right
    assert torch.allclose(right.T @ half + half.T @ right, whole, rtol=1e-9, atol=1e-9)


def fit(block, right, offset, judge, wanted, energy):
    """Return a fit of a block, judged by another matrix and what is wanted there."""
    n, h = len(block), len(offset)
    mine = Equations(
        rows_of(block), [(slice(0, h), torch.cat([right, wanted.new_zeros(1, 2 * h)]))], energy
    )
    theirs = Equations(rows_of(judge), [(slice(0, h), torch.cat([wanted, 0 * wanted], 1))], energy)
    return Fit(mine, theirs, offset, torch.empty(n, n, dtype=torch.float64))


@pytest.mark.parametrize("damp", LADDER)
@pytest.mark.parametrize("n", [0, 5, ROW_BLOCK + 3])
def test_a_parabola_is_the_error_of_every_share(damp, n):
    """Against the normal equations of the same sums, solved for each share alone."""
    h, generator = 4, torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    block, right, offset = positive(n), draw(n, 2 * h), draw(h)
    judge, wanted, energy = positive(n + 1, 2), draw(n + 1, h), draw(1)[0]
    parabola = fit(block, right, offset, judge, wanted, energy).parabola(damp)
    for share in (0.0, 0.4, 1.0):
        change = torch.zeros(n + 1, h).double()
        if damp < math.inf and n:
            ridge = damp * block.diagonal().mean() * torch.eye(n).double()
            change[:n] = torch.linalg.solve(block + ridge, right[:, :h] + share * right[:, h:])
        change[n] = share * offset
        error = energy - 2 * (change * wanted).sum() + (change * (judge @ change)).sum()
        assert float(
            parabola @ torch.tensor([1.0, share, share**2], dtype=torch.float64)
        ) == pytest.approx(float(error), rel=1e-9)


def test_a_singular_block_has_no_error():
    zero, edge = torch.zeros(3, 3).double(), torch.zeros(4, 4).double()
    singular = fit(zero, zero[:, :2], zero[0, :1], edge, edge[:, :1], zero[0, 0])
    assert singular.parabola(0.0).isnan().all() and not singular.parabola(1.0).isnan().any()


def constants(errors, ladder=LADDER):
    """Return errors by fold and λ as a function of λ, and the λ that were asked for."""
    asked = []

    def parabolas(damp):
        asked.append(damp)
        values = torch.tensor([fold[ladder.index(damp)] for fold in errors], dtype=torch.float64)
        return torch.stack([values, 0 * values, 0 * values], 1)

    return parabolas, asked


@pytest.mark.parametrize(
    ("errors", "damp", "tried"),
    [
        ([5.0, 4.0, 3.0, 2.0], math.inf, 2),  # dropping does best
        ([5.0, 4.0, 1.0, 2.0], 1e-1, 3),
        ([5.0, 0.5, 1.0, 2.0], 1e-2, 4),
        ([0.2, 0.5, 1.0, 2.0], 1e-3, 4),
        ([1.0, 1.0, 1.0, 1.0], 1e-3, 4),  # of equal ones the whole ladder's first
        ([0.1, 4.0, 1.0, 2.0], 1e-1, 3),  # what lies beyond a rise is not seen
        ([math.nan, math.nan, 1.0, 2.0], 1e-1, 3),
    ],
)
def test_the_walk_ends_where_the_error_rises(errors, damp, tried):
    parabolas, asked = constants([errors, errors])
    choice = choose(parabolas, LADDER, 0.0, 1.0)
    assert (choice.damp, choice.tried) == (damp, tried) == (choice.damp, len(asked))
    assert asked == LADDER[::-1][:tried]
    assert float(choice.held_out) == 2 * errors[LADDER.index(damp)]


def test_what_does_worse_than_dropping_in_one_fold_is_left_out():
    parabolas, _ = constants([[9.0, 0.0, 1.0, 2.0], [9.0, 2.5, 2.0, 2.0]])
    assert choose(parabolas, LADDER, 0.0, 1.0).damp == 1e-1


def test_a_given_damp_is_taken_even_where_nothing_is_known_of_it():
    parabolas, _ = constants([[math.nan], [1.0]], [0.0])
    choice = choose(parabolas, [0.0], 0.0, 1.0)
    assert choice.damp == 0.0 and choice.held_out.isnan()
