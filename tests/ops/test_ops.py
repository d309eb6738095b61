"""The boundary: schemas, fakes, torch.compile, meta tensors, kernel paths."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import sums

from liar_ext import ops
from liar_ext.ops import dispatch

OPS = torch.ops.liar_ext
CHILD = Path(__file__).parent


def solve_arguments(device="cpu", d=20):
    x = torch.randn(100, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (
        torch.ones(3, d, dtype=torch.float64, device=device),
        (x.mT @ x).to(device),
        torch.arange(0, d, 2, device=device),
        torch.tensor([0.0, 0.1, torch.inf], dtype=torch.float64, device=device),
    )


def test_schemas():
    assert str(OPS.gram_update_.default._schema) == (
        "liar_ext::gram_update_(Tensor(a!) gram, Tensor(b!) total, Tensor(c!) count, Tensor x, "
        "Tensor? y=None, Tensor? weight=None) -> ()"
    )
    assert str(OPS.reconstruct.default._schema) == (
        "liar_ext::reconstruct(Tensor weight, Tensor gram, Tensor kept, Tensor damps, "
        "Tensor? holdout=None, Tensor? cross=None, Tensor? holdout_cross=None, "
        "bool errors_only=False) -> "
        "(Tensor weight, Tensor error, Tensor holdout_error, Tensor info)"
    )
    assert str(OPS.obs_curve.default._schema) == (
        "liar_ext::obs_curve(Tensor weight, Tensor gram, int width, float damp, int at_least, "
        "int groups=1) -> (Tensor order, Tensor error, Tensor info)"
    )


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("y", [None, 4])
@pytest.mark.parametrize("weight", [None, torch.bool, torch.float32])
def test_opcheck_gram_update(tokens, y, weight):
    x = torch.randn(tokens, 7)
    y = None if y is None else torch.randn(tokens, y)
    weight = None if weight is None else torch.ones(tokens, dtype=weight)
    cols = None if y is None else y.shape[1]
    torch.library.opcheck(OPS.gram_update_.default, (*sums(7, cols), x, y, weight))


@pytest.mark.parametrize("holdout", [False, True])
@pytest.mark.parametrize("dense_targets", [False, True])
def test_opcheck_reconstruct(holdout, dense_targets):
    arguments = solve_arguments()
    gram, cross = arguments[1], torch.ones(20, 3, dtype=torch.float64)
    extra = (
        gram if holdout else None,
        cross if dense_targets else None,
        cross if holdout and dense_targets else None,
    )
    torch.library.opcheck(OPS.reconstruct.default, (*arguments, *extra))


@pytest.mark.parametrize("holdout", [False, True])
def test_opcheck_reconstruct_of_several_sites(holdout):
    weight, gram, kept, damps = solve_arguments()
    sites = [torch.stack([tensor, tensor]) for tensor in (weight, gram, kept)]
    torch.library.opcheck(OPS.reconstruct.default, (*sites, damps, sites[1] if holdout else None))


def test_compiles_into_one_graph():
    def add_and_solve(gram, total, count, x, weight, kept, damps):
        ops.gram_update_(gram, total, count, x)
        return ops.reconstruct(weight, gram, kept, damps)[0] * 2

    x = torch.randn(90, 20, generator=torch.Generator().manual_seed(0))
    weight, _, kept, damps = solve_arguments()
    eager_sums, compiled_sums = sums(20), sums(20)
    want = add_and_solve(*eager_sums, x, weight, kept, damps)
    got = torch.compile(add_and_solve, fullgraph=True, backend="aot_eager")(
        *compiled_sums, x, weight, kept, damps
    )
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(eager_sums, compiled_sums, strict=True))


def test_meta_tensors_give_shapes():
    ops.gram_update_(*sums(5, device="meta"), torch.empty(7, 5, device="meta"))
    new, error, held_out, info = ops.reconstruct(*solve_arguments("meta"))
    assert new.shape == (3, 3, 10) and error.shape == (3,) and held_out.shape == (0,)
    assert info.shape == (3, 2) and new.device.type == "meta"
    weight, gram, kept, damps = solve_arguments("meta")
    sites = (weight.expand(4, -1, -1), gram.expand(4, -1, -1), kept.expand(4, -1), damps)
    new, error, held_out, info = ops.reconstruct(*sites, holdout=sites[1], errors_only=True)
    assert new.shape == (4, 0, 3, 10) and error.shape == held_out.shape == (4, 3)
    assert info.shape == (4, 3, 2)


def test_build_info_names_what_runs():
    info = ops.build_info()
    assert set(info) >= {"compiler", "torch_target", "torch_built", "cpu_kernel", "cuda"}
    assert info["cpu_kernel"] in info["cpu_kernels"].split(", ")


def run_with_kernel(kernel, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "LIAR_CPU_KERNEL": kernel},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", ops.build_info()["cpu_kernels"].split(", "))
def test_every_kernel_path_of_this_machine(kernel):
    """The numerical tests once more, on each instruction set that the CPU has."""
    if kernel == ops.build_info()["cpu_kernel"]:
        pytest.skip("the path that all other tests take")
    names = ("ops_gram", "ops_obs_curve", "ops_reconstruct", "limits")
    numerical = [str(CHILD / f"test_{name}.py") for name in names]
    result = run_with_kernel(kernel, "-m", "pytest", "-p", "no:cacheprovider", *numerical)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.skipif(bool(dispatch.MISSING), reason="the extension reads it")
def test_unknown_kernel_is_refused_by_name():
    code = "from liar_ext import ops; ops.build_info()"
    result = run_with_kernel("sse9", "-c", code)
    assert result.returncode != 0
    assert "LIAR_CPU_KERNEL: must be one of" in result.stderr and "sse9" in result.stderr
