"""The solve by torch.linalg, which CUDA takes, beside the compiled one of the CPU."""

import pytest
import torch
from covers import cover
from test_ops_reconstruct import LADDER, gram_of, problem

from liar_ext import ops
from liar_ext.ops import reference


def same(got, want):
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape and mine.is_contiguous()
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8, equal_nan=True)


@cover(
    2,
    size=[(40, 6), (40, 90), (129, 30)],
    kept=["none", "few", "most", "all"],
    held_out=[False, True],
    targets=[False, True],
    errors_only=[False, True],
    sites=[0, 2],
)
def test_solves_agree_with_the_compiled_ones(size, kept, held_out, targets, errors_only, sites):
    d, d_out = size
    n = {"none": 0, "few": d // 4, "most": d - 5, "all": d}[kept]
    each = []
    for site in range(max(1, sites)):
        weight, x = problem(400, d, d_out, seed=site)
        other = problem(300, d, d_out, seed=9 + site)[1]
        generator = torch.Generator().manual_seed(site)
        chosen = torch.randperm(d, generator=generator)[:n].sort().values
        dense = weight + 0.1 * torch.randn(d_out, d, generator=generator, dtype=torch.float64)
        each.append(
            (
                *(weight, gram_of(x), chosen, gram_of(other)),
                *((one.mT @ one) @ dense.mT for one in (x, other)),
            )
        )
    stacked = [torch.stack(parts) if sites else parts[0] for parts in zip(*each, strict=True)]
    weight, gram, chosen, holdout, cross, holdout_cross = stacked
    arguments = [weight.float(), gram, chosen, LADDER, holdout if held_out else None]
    arguments += [cross, holdout_cross if held_out else None] if targets else [None, None]
    same(reference.reconstruct(*arguments, errors_only), ops.reconstruct(*arguments, errors_only))


def test_what_cannot_be_solved_has_a_code():
    weight, x = problem(30, 40, 6)  # fewer tokens than features
    kept, gram = torch.arange(36), x.mT @ x
    damps = torch.tensor([0.0, 1.0], dtype=torch.float64)
    new, error, _, info = reference.reconstruct(weight, gram, kept, damps)
    assert info[0, 0] > 0 and error[0].isnan() and new[0].isnan().all()
    assert info[1, 0] == 0 and error[1].isfinite() and new[1].isfinite().all()
    for spoilt in ((weight * torch.nan, gram), (weight, gram * torch.inf)):
        _, error, _, info = reference.reconstruct(*spoilt, kept, damps)
        assert info[:, 0].tolist() == [-2, -2] and error.isnan().all()


@pytest.mark.parametrize("kept", [[3, 2], [2, 2], [-1, 2], [2, 40]])
def test_indices_that_do_not_ascend_have_a_code(kept):
    weight, x = problem(90, 40, 6)
    _, error, _, info = reference.reconstruct(weight, x.mT @ x, torch.tensor(kept), LADDER)
    assert info[:, 0].tolist() == [-1] * 5 and error.isnan().all()


def test_no_damps_and_sums_in_float32():
    weight, x = problem(90, 40, 50)
    kept, gram = torch.arange(0, 40, 3), (x.mT @ x).float()
    for damps in (LADDER[:0], LADDER):
        same(
            reference.reconstruct(weight, gram, kept, damps),
            ops.reconstruct(weight, gram, kept, damps),
        )


def test_nothing_waits_for_a_value():
    """Nor could a graph be captured: tensors without values have none to wait for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, x = problem(90, 40, 50)
    gram, kept = x.mT @ x, torch.arange(0, 40, 3)
    want = reference.reconstruct(weight, gram, kept, LADDER, gram)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(one) for one in (weight, gram, kept, LADDER, gram)]
        got = reference.reconstruct(*inputs)
    assert [one.shape for one in got] == [one.shape for one in want]
