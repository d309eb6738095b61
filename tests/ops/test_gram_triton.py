"""The Triton kernel in Triton's interpreter, against float64: `make triton`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")
from covers import cover  # noqa: E402
from oracle import sums  # noqa: E402

from liar_ext.ops import backends, gram_triton, reference  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Ragged in tokens and in features, several tiles, and beyond the tokens of a launch.
SHAPES = [(1, 1), (70, 33), (513, 128), (300, 161), (65, 390), (2100, 40)]


@cover(2, dtype=DTYPES, shape=SHAPES, kind=["none", "mask", "real"], cross=[0, 7, 133])
def test_the_kernel_agrees_with_float64(dtype, shape, kind, cross):
    tokens, d = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d + 3, generator=generator).to(dtype)[:, :d]  # strided rows
    y = torch.randn(tokens, cross, generator=generator).to(dtype) if cross else None
    weight = torch.rand(tokens, generator=generator)
    weight = {"none": None, "mask": weight > 0.3, "real": weight}[kind]
    if tokens > 1:
        x[0, 0], x[tokens - 1, d - 1] = torch.nan, torch.inf
    got, want = sums(d, cross or d), sums(d, cross or d)
    above = torch.ones(d, d, dtype=torch.bool).triu(1)
    if not cross:
        got[0][above] = torch.nan
    gram_triton.gram_update_(*got, x, y, weight)
    reference.gram_update_(*want, x.double(), None if y is None else y.double(), weight)
    if not cross:
        assert got[0][above].isnan().all()
        got[0][above] = 0
    clean = x.double().nan_to_num(posinf=0).abs()
    right = clean if y is None else y.double().abs()
    scale = (clean.mT @ right).max() + 1e-30
    bound = backends.GRAM_TOLERANCE.get(dtype, 2.0**-17)
    assert (got[0] - want[0]).abs().max() <= bound * scale
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_passes_the_check_of_the_chooser(dtype):
    kind = backends.gram_kind(torch.device("cpu"), dtype, torch.float64, False, False)
    assert backends.gram_fault(gram_triton.gram_update_, kind) == ""


def test_sums_in_float32_and_no_tokens():
    x = torch.randn(90, 20)
    got, want = sums(20, 20, torch.float32), sums(20, 20)
    for op, to in ((gram_triton, got), (reference, want)):
        op.gram_update_(*to, x[:0])
        op.gram_update_(*to, x)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 9])
def test_every_tile_of_a_triangle_comes_once(rows):
    """What each program adds is one: a tile that comes twice would be two."""
    d = rows * 128 - 5
    x = torch.zeros(1, d, dtype=torch.bfloat16)
    x[:, ::64] = 1
    gram, total, count = sums(d, d, torch.float32)
    gram_triton.gram_update_(gram, total, count, x)
    assert torch.equal(gram[::64, ::64], torch.ones_like(gram[::64, ::64]).tril())
