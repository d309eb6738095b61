"""Rates: shares of this machine's peak, measured; peaks of a GPU, as its vendor publishes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import cpu_seconds
from bench.peak import measured_peaks
from liar_ext import ops

# NVIDIA H100 SXM, dense, from its data sheet: products of bfloat16 and of TF32, and float64 by
# tensor cores; bytes a second of memory, of NVLink and of PCI Express 5.0, each in one direction.
BF16, TF32, F64 = 989e12, 495e12, 67e12
MEMORY, NVLINK, PCIE, DEVICE = 3.35e12, 450e9, 64e9, 80e9
PEAKS = {
    "forward": BF16,
    "gram": BF16,
    "gram32": TF32 / 3,  # docs/cuda.md: a product of float32 is three of TF32
    "product": F64,
    "cholesky": F64,
}
# docs/cuda.md: what `gram_update_` is expected to reach on an H100, by its machine code and the L2
# cache; the middle of 310 to 390, and of 60 to 75. A CPU core's share says nothing of that.
EXPECTED = {"gram": 350e12, "gram32": 67e12}
# By `make scaling SCALING=--measure` on one thread of a Zen 4 core, in CPU time, others busy.
SHARES = {
    "forward": 0.80,
    "gram": 0.81,
    "gram32": 0.89,
    "product": 0.83,
    "cholesky": 0.42,
}
WHAT = {
    "forward": "torch's product, bfloat16",
    "gram": "`gram_update_`, bfloat16 rows, float64 sums",
    "gram32": "`gram_update_`, float32 rows, float64 sums",
    "product": "torch's product, float64",
    "cholesky": "torch's Cholesky factor and the inverse of it, float64",
}


def rate(kind: str, shares: dict[str, float]) -> float:
    """Return operations a second of a GPU: its peak times the share measured here, or less."""
    return min(PEAKS[kind] * shares[kind], EXPECTED.get(kind, float("inf")))


def measure() -> dict[str, float]:
    """Return the share of one core's peak that each kind of operation reaches here.

    The least CPU time of five calls, of shapes as in real layers, on one thread.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        peaks = measured_peaks(Path(folder))
    if not peaks:
        raise SystemExit("scaling: --measure needs a C++ compiler, c++, for the peak of this core")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    n, d, tokens = 1536, 4096, 1024
    brain, double = torch.bfloat16, torch.float64
    x, weight = draw(tokens, d, dtype=brain), draw(d, d, dtype=brain)
    gram = torch.zeros(d, d, dtype=double), torch.zeros(d, dtype=double), torch.zeros(2).double()
    square = draw(n, n, dtype=double)
    positive, eye = square @ square.mT + n * torch.eye(n).double(), torch.eye(n, dtype=double)

    def factor() -> None:
        lower = torch.linalg.cholesky(positive)
        torch.linalg.solve_triangular(lower, eye, upper=False)

    wide = x.float()
    timed: dict[str, tuple[Callable[[], object], float, torch.dtype]] = {
        "forward": (lambda: x @ weight, 2 * tokens * d**2, brain),
        "gram": (lambda: ops.gram_update_(*gram, x), tokens * d * (d + 1), brain),
        "gram32": (lambda: ops.gram_update_(*gram, wide), tokens * d * (d + 1), torch.float32),
        "product": (lambda: square @ square, 2 * n**3, double),
        "cholesky": (factor, 4 / 3 * n**3, double),
    }
    return {
        name: operations / cpu_seconds(call, rounds=5) / (peaks[dtype] * 1e9)
        for name, (call, operations, dtype) in timed.items()
    }
