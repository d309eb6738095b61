"""The build with CUDA kernels in it, on whatever machine this is."""

import os

import pytest
import torch

from liar_ext import ops

BUILT = ops.build_info()["cuda"] == "compiled"
needs_kernels = pytest.mark.skipif(not BUILT, reason="built without CUDA kernels")


def test_cuda_kernels_were_built_if_required():
    if os.environ.get("LIAR_REQUIRE_CUDA") == "1":
        assert BUILT and torch.cuda.is_available()


@needs_kernels
def test_import_without_a_driver_finds_no_device():
    if not torch.cuda.is_available():
        assert ops.build_info()["cuda_devices"] == "0"


@needs_kernels
@pytest.mark.parametrize("name", ["gram_update_", "reconstruct"])
def test_kernels_are_registered_for_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"liar_ext::{name}", "CUDA")


def on_cuda(op, *arguments):
    """Call the CUDA launcher itself, whose checks need no GPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return op.default.redispatch(keys, *arguments)


@needs_kernels
def test_launchers_check_first():
    gram, total, count = torch.zeros(3, 3), torch.zeros(3), torch.zeros(2, dtype=torch.float64)
    x = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match=r"gram_update_: x must be \(tokens, 3\), got \(4, 2\)"):
        on_cuda(torch.ops.liar_ext.gram_update_, gram, total, count, x[:, :2])
    with pytest.raises(RuntimeError, match="gram_update_: gram must be on the CUDA device of x"):
        on_cuda(torch.ops.liar_ext.gram_update_, gram, total, count, x)
    arguments = x, gram, torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match="reconstruct: gram must be on the CUDA device of weight"
    ):
        on_cuda(torch.ops.liar_ext.reconstruct, *arguments)
    with pytest.raises(RuntimeError, match=r"reconstruct: damps must be \(L,\) float64"):
        on_cuda(torch.ops.liar_ext.reconstruct, *arguments[:3], torch.ones(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (129, 7), (300, 129), (5000, 264)])
@pytest.mark.parametrize("weighted", ["none", "mask", "real"])
def test_gram_on_a_gpu(dtype, shape, weighted):
    from liar_ext import reference

    x = torch.randn(shape, device="cuda").to(dtype)
    weight = {
        "none": None,
        "mask": torch.rand(shape[0], device="cuda") > 0.3,
        "real": torch.rand(shape[0], device="cuda"),
    }[weighted]
    x[0, 0] = torch.inf
    results = []
    for op, rows in [(ops, x), (reference, x.double())]:
        sums = [
            torch.zeros(s, device="cuda", dtype=torch.float64)
            for s in [shape[1:] * 2, shape[1:], (2,)]
        ]
        op.gram_update_(*sums, rows, None, weight)
        results.append(sums)
    scale = (x[1:].double().abs().mT @ x[1:].double().abs()).max() if shape[0] > 1 else 1
    bound = {torch.float64: 1e-13, torch.float32: 2**-20}.get(dtype, 2**-17)
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= bound * scale + 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [(9, 4, 3), (70, 33, 65), (300, 100, 211)])
def test_reconstruct_on_a_gpu(size):
    from liar_ext import reference

    d, d_out, n = size
    x = torch.randn(3 * d, d, dtype=torch.float64, device="cuda")
    weight = torch.randn(d_out, d, dtype=torch.float64, device="cuda")
    kept = torch.randperm(d, device="cuda")[:n].sort().values
    damps = torch.tensor([0, 1e-3, torch.inf], dtype=torch.float64, device="cuda")
    arguments = weight, (x.mT @ x).tril(), kept, damps, (x[:d].mT @ x[:d]).tril()
    for mine, theirs in zip(
        ops.reconstruct(*arguments), reference.reconstruct(*arguments), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
