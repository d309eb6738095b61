"""unit_energy and fisher_update_ against their definitions, on nasty shapes and bad arguments."""

import pytest
import torch

from liar_ext import ops
from liar_ext.ops import reference

OPS = torch.ops.liar_ext
SHAPES = [(1, 1, 1), (7, 7, 1), (4, 12, 3), (9, 600, 1), (129, 129, 43), (33, 70, 70), (5, 1030, 2)]


def problem(d_out, d, seed=0):
    """A weight, and a lower triangle with NaN above it: whatever reads that is found out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * d, d, generator=generator, dtype=torch.float64)
    gram = x.mT @ x
    gram[torch.ones_like(gram, dtype=torch.bool).triu(1)] = torch.nan
    return torch.randn(d_out, d, generator=generator, dtype=torch.float64), gram, x


@pytest.mark.parametrize(("d_out", "d", "width"), SHAPES)
def test_energy_is_the_error_of_dropping_a_unit(d_out, d, width):
    weight, gram, x = problem(d_out, d)
    units = d // width
    want = torch.stack(
        [
            (x[:, u * width : (u + 1) * width] @ weight[:, u * width : (u + 1) * width].mT)
            .square()
            .sum()
            for u in range(units)
        ]
    )
    for op in (ops, reference):
        torch.testing.assert_close(op.unit_energy(weight, gram, width), want, rtol=1e-11, atol=0)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_energy_of_narrow_and_strided_arguments(dtype, width):
    weight, gram, _ = problem(6, 24)
    weight, gram = weight.to(dtype), gram.float()
    want = ops.unit_energy(weight.double(), gram.double(), width)
    assert torch.equal(ops.unit_energy(weight, gram, width), want)
    strided = weight.mT.contiguous().mT, torch.cat([gram, gram], 1)[:, :24]
    assert torch.equal(ops.unit_energy(*strided, width), want)


def by_definition(x, grad, width):
    products = (x.double() * grad.double()).reshape(*x.shape[:2], x.shape[2] // width, width)
    return products.sum((1, 3)).square().sum(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4, 2), (2, 0, 4, 2), (1, 1, 1, 1), (3, 9, 12, 4), (2, 5, 700, 1), (2, 3, 1200, 600)],
)
def test_fisher_adds_squares_of_sums_by_sequence(shape, dtype):
    *shape, width = shape
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    for op in (ops, reference):
        fisher = torch.ones(shape[2] // width, dtype=torch.float64)
        op.fisher_update_(fisher, x, grad, width)
        torch.testing.assert_close(fisher, 1 + by_definition(x, grad, width), rtol=1e-12, atol=0)


def test_fisher_of_strided_arguments():
    x, grad = torch.randn(2, 3, 9, 20, dtype=torch.float64).unbind()
    want = torch.zeros(5, dtype=torch.float64)
    ops.fisher_update_(want, x[:, 1:7], grad[:, 1:7], 4)
    for strided in (lambda a: a[:, 1:7], lambda a: a.mT.contiguous().mT[:, 1:7]):
        got = torch.zeros(5, dtype=torch.float64)
        ops.fisher_update_(got, strided(x), strided(grad), 4)
        assert torch.equal(got, want)


@pytest.mark.parametrize("width", [1, 20])
def test_bit_identical_whatever_the_threads(width):
    weight, gram, x = problem(40, 600)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            fisher = torch.zeros(600 // width, dtype=torch.float64)
            ops.fisher_update_(fisher, x.view(4, -1, 600), x.view(4, -1, 600), width)
            results.append((ops.unit_energy(weight, gram, width), fisher))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("width", [1, 3])
def test_opcheck_and_meta(width):
    weight, gram, x = problem(4, 12)
    torch.library.opcheck(OPS.unit_energy.default, (weight, gram.tril(), width))
    fisher, x = torch.zeros(12 // width, dtype=torch.float64), x.view(2, -1, 12)
    torch.library.opcheck(OPS.fisher_update_.default, (fisher, x, x, width))
    assert ops.unit_energy(weight.to("meta"), gram.to("meta"), width).shape == (12 // width,)


def test_rejected_arguments_name_the_rule_and_the_remedy():
    weight, gram, x = problem(4, 12)
    cases = [
        ((weight[0], gram, 1), r"weight must be a float tensor \(d_out, d\)"),
        ((weight, gram[:5], 1), r"gram must be \(12, 12\), got \(5, 12\)"),
        ((weight, gram.half(), 1), "gram must be float32 or float64; convert"),
        ((weight, gram, 5), "width must divide the 12 features, got 5"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match="unit_energy: .*" + message):
            ops.unit_energy(*arguments)
    fisher, x = torch.zeros(4, dtype=torch.float64), x.view(2, -1, 12)
    cases = [
        (
            (fisher, x[0], x[0], 3),
            r"x must be a float tensor \(sequences, tokens, d\), got \(12",
        ),
        ((fisher, x, x[:1], 3), r"grad must have the shape of x, \(2, 12, 12\), got \(1, 12, 12\)"),
        ((fisher, x, x.float(), 3), "grad must have the dtype of x; convert it first"),
        ((fisher, x, x, 5), "width must divide the 12 features, got 5"),
        ((fisher.float(), x, x, 3), r"fisher must be \(4,\) float64 and contiguous"),
        ((fisher[:3], x, x, 3), r"fisher must be \(4,\) float64 and contiguous, got \(3,\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match="fisher_update_: .*" + message):
            ops.fisher_update_(*arguments)
