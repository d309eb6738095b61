"""The build with CUDA kernels in it, on whatever machine this is."""

import os
import re
import sys

import pytest
import torch

from liar_ext import ops
from liar_ext.ops import backends, dispatch

BUILT = ops.build_info()["cuda"] == "compiled"
OPERATORS = ("gram_update_", "reconstruct", "obs_curve")
KERNELS = ("gram_update_", "_solve_small", "_eliminate_")  # what of them is compiled
needs_kernels = pytest.mark.skipif(not BUILT, reason="built without CUDA kernels")


def test_cuda_kernels_were_built_if_required():
    if os.environ.get("LIAR_REQUIRE_CUDA") == "1":
        assert BUILT and torch.cuda.is_available()


@needs_kernels
def test_import_without_a_driver_finds_no_device():
    info = ops.build_info()
    if info["cuda_driver"] == "none":
        assert info["cuda_devices"] == "0"


@needs_kernels
def test_versions_of_cuda_are_told():
    """A driver older than the runtime offers no device, and nobody would know why."""
    info = ops.build_info()
    assert re.fullmatch(r"\d+\.\d+", info["cuda_runtime"])
    assert re.fullmatch(r"\d+\.\d+|none", info["cuda_driver"])
    assert info["cuda_driver"] != "none" or not torch.cuda.is_available()
    assert re.fullmatch(r"(\d+\.\d+a?(\+PTX)?(, )?)+", info["cuda_archs"])


@needs_kernels
@pytest.mark.parametrize("name", sorted({*OPERATORS, *KERNELS}))
def test_kernels_are_registered_for_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"liar_ext::{name}", "CUDA")


def call_on(device, op, *arguments):
    """Call what an operator does on a device, whose checks need no such device."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    return getattr(torch.ops.liar_ext, op).default.redispatch(keys, *arguments)


def arguments_of(op):
    """Valid ones, on the CPU."""
    gram, total, count = torch.eye(4), torch.zeros(4), torch.zeros(2, dtype=torch.float64)
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    return {
        "gram_update_": (gram, total, count, x),
        "reconstruct": (weight, gram, torch.tensor([0]), torch.ones(1, dtype=torch.float64)),
        "obs_curve": (weight, gram, 2, 0.1, 0),
    }[op]


@needs_kernels
def test_launchers_want_everything_on_one_cuda_device():
    with pytest.raises(RuntimeError, match="gram must be on the CUDA device of x; move it"):
        call_on("CUDA", "gram_update_", *arguments_of("gram_update_"))


@pytest.mark.parametrize("op", ["reconstruct", "obs_curve"])
def test_solves_on_cuda_want_everything_on_one_device(op):
    weight, *others = arguments_of(op)
    with pytest.raises(RuntimeError, match=f"{op}: gram must be on the META device of weight"):
        call_on("CUDA", op, weight.to("meta"), *others)


@needs_kernels
def test_launchers_check_shapes_first():
    gram, total, count, x = arguments_of("gram_update_")
    with pytest.raises(RuntimeError, match=r"gram_update_: x must be \(tokens, 4\), got \(3, 2\)"):
        call_on("CUDA", "gram_update_", gram, total, count, x[:, :2])


def test_solves_on_cuda_check_shapes_first():
    gram = torch.eye(4)
    with pytest.raises(RuntimeError, match=r"reconstruct: damps must be \(L,\) float64"):
        call_on("CUDA", "reconstruct", *arguments_of("reconstruct")[:3], torch.ones(1))
    with pytest.raises(RuntimeError, match="obs_curve: width must divide the 4 features, got 3"):
        call_on("CUDA", "obs_curve", torch.ones(2, 4), gram, 3, 0.1, 0)


@pytest.mark.parametrize("device", ["XPU", "MPS"])
@pytest.mark.parametrize("op", OPERATORS)
def test_torch_serves_a_device_without_kernels_after_one_warning(op, device):
    dispatch._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"has no kernels for {device}; plain torch") as said:
        found = [call_on(device, op, *arguments_of(op)) for _ in range(2)][0]
    assert len(said) == 1
    if op != "gram_update_":
        torch.testing.assert_close(found, getattr(ops, op)(*arguments_of(op)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (129, 7), (300, 129), (5000, 264)], ids=str)
@pytest.mark.parametrize("weighted", ["none", "mask", "real"])
def test_gram_on_a_gpu(dtype, shape, weighted):
    from liar_ext.ops import reference

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
@pytest.mark.skipif("simulated_gpu" in sys.modules, reason="minutes of emulated tensor cores")
@pytest.mark.parametrize("backend", ["csrc", "triton", "torch"])
def test_fewer_tokens_than_features_on_a_real_gpu(backend, monkeypatch):
    """Sums that truncating accumulators make too small are not definite at λ = 1e-6."""
    found = backends.gram_backends(torch.device("cuda", 0))
    if backend not in found:
        pytest.skip(f"no {backend} here")
    x = torch.randn(2048, 2304, device="cuda").bfloat16()
    sums = [torch.zeros(s, device="cuda").double() for s in ([2304, 2304], 2304, 2)]
    found[backend](*sums, x)
    full = sums[0].tril() + sums[0].tril(-1).mT
    assert torch.linalg.eigvalsh(full)[0] >= -5e-7 * full.diagonal().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [(9, 4, 3), (70, 33, 65), (300, 100, 211)], ids=str)
def test_reconstruct_on_a_gpu(size):
    import oracle

    d, d_out, n = size
    x = torch.randn(3 * d, d, dtype=torch.float64, device="cuda")
    weight = torch.randn(d_out, d, dtype=torch.float64, device="cuda")
    kept = torch.randperm(d, device="cuda")[:n].sort().values
    damps = torch.tensor([0, 1e-3, torch.inf], dtype=torch.float64, device="cuda")
    arguments = weight, (x.mT @ x).tril(), kept, damps, (x[:d].mT @ x[:d]).tril()
    for mine, theirs in zip(
        ops.reconstruct(*arguments), oracle.reconstruct(*arguments), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [(9, 4, 3), (70, 33, 65), (300, 100, 211)], ids=str)
def test_reconstruct_a_batch_on_a_gpu(size):
    d, d_out, n = size
    x = torch.randn(5, 3 * d, d, dtype=torch.float64, device="cuda")
    weight = torch.randn(5, d_out, d, dtype=torch.float64, device="cuda")
    kept = torch.stack([torch.randperm(d, device="cuda")[:n].sort().values for _ in range(5)])
    damps = torch.tensor([0, 1e-3, torch.inf], dtype=torch.float64, device="cuda")
    gram = (x.mT @ x).tril()
    batch = ops.reconstruct(weight, gram, kept, damps, gram)
    for i in range(5):
        alone = ops.reconstruct(weight[i], gram[i], kept[i], damps, gram[i])
        for mine, theirs in zip(batch, alone, strict=True):
            assert torch.equal(mine[i], theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("d", "width", "groups"), [(70, 1, 7), (300, 1, 1), (192, 64, 1), (96, 8, 3)]
)
def test_curves_on_a_gpu(d, width, groups):
    import oracle

    x = torch.randn(3, d, d, dtype=torch.float64, device="cuda")
    weight = torch.randn(40, d, dtype=torch.float64, device="cuda")
    gram = (x.flatten(0, 1).mT @ x.flatten(0, 1)).tril()
    arguments = weight, gram, width, 1e-2, groups, groups
    order, error, info = ops.obs_curve(*arguments)
    want = oracle.obs_curve(*arguments)
    assert torch.equal(order, want[0])
    torch.testing.assert_close((error, info), want[1:], rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_operators_are_captured_into_a_graph():
    """Capture forbids synchronising and allocating outside torch's pool."""
    x = torch.randn(300, 64, device="cuda")
    weight = torch.randn(8, 64, device="cuda", dtype=torch.float64)
    sums = [torch.zeros(s, device="cuda", dtype=torch.float64) for s in [(64, 64), (64,), (2,)]]
    kept = torch.arange(0, 64, 2, device="cuda")
    damps = torch.ones(2, device="cuda", dtype=torch.float64)

    def work():
        ops.gram_update_(*sums, x)
        gram = sums[0]
        return [
            *ops.reconstruct(weight, gram, kept, damps),
            *ops.obs_curve(weight, gram, 16, 1e-2, 0),
        ]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = work()
    for a in sums:
        a.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
