"""gram_update_ beside torch, scipy's BLAS and the peers' way, on the shapes of real layers.

The work that a Gram matrix needs is ``tokens · d²`` flops (one triangle). Every contender's rate is
of that work, so a full product can reach half of the peak at most.
"""

import pytest
import torch

from liar_ext import ops

SHAPES = {
    "head64": (8192, 64),
    "SmolLM2-135M.attn": (8192, 576),
    "SmolLM2-135M.mlp": (8192, 1536),
    "ragged": (4096, 1537),
    "BERT-base.mlp": (4096, 3072),
    "Qwen2.5-0.5B.mlp": (2048, 4864),
    "Llama-3-8B.mlp": (256, 14336),
    "8tokens": (8, 1536),
    "8tokens.wide": (8, 14336),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def ours(x, dtype=torch.float64):
    d = x.shape[1]
    sums = (
        torch.zeros(d, d, dtype=dtype),
        torch.zeros(d, dtype=dtype),
        torch.zeros(2, dtype=torch.float64),
    )
    return lambda: ops.gram_update_(*sums, x)


def ours_f32_sums(x):
    """Return ours with sums of half the size: what few tokens cost is to read and write them."""
    return ours(x, torch.float32)


def torch_product(x):
    """Return the bare product in the rows' dtype: no sums, no finite check, nothing added up."""
    return lambda: x.T @ x


def peers(x):
    """Do as GPTQ, SparseGPT and llm-compressor: float32 copy, full product, add."""
    total = torch.zeros(x.shape[1], x.shape[1])

    def call():
        single = x.float()
        total.add_(single.T @ single)

    return call


def scipy_syrk(x):
    blas = pytest.importorskip("scipy.linalg.blas")
    rows = x.float().numpy()
    return lambda: blas.ssyrk(1.0, rows.T, lower=1)


CONTENDERS = {
    "ours": ours,
    "ours-f32-sums": ours_f32_sums,
    "torch": torch_product,
    "peers": peers,
    "scipy": scipy_syrk,
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram(measure, benchmark, shape, dtype, contender):
    tokens, d = SHAPES[shape]
    if contender == "scipy" and dtype != "f32":
        pytest.skip("BLAS has no such product")
    if contender == "torch" and dtype == "f16" and tokens * d * d > 3e10:
        pytest.skip("minutes")
    benchmark.group = f"{shape} {tokens}x{d} {dtype}"
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    rounds = 1 if contender == "torch" and dtype == "f16" and tokens * d * d > 1e9 else 7
    measure(CONTENDERS[contender](x), flops=tokens * d * d, dtype=DTYPES[dtype], rounds=rounds)


@pytest.mark.parametrize("contender", ["ours", "peers"])
def test_cross_gram(measure, benchmark, contender):
    tokens, d, cols = 8192, 1536, 576
    benchmark.group = "cross 8192x1536x576 f32"
    x, y = torch.randn(tokens, d), torch.randn(tokens, cols)
    sums = (
        torch.zeros(d, cols, dtype=torch.float64),
        torch.zeros(d, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    total = torch.zeros(d, cols)
    call = (
        (lambda: ops.gram_update_(*sums, x, y))
        if contender == "ours"
        else (lambda: total.add_(x.T @ y))
    )
    measure(call, flops=2 * tokens * d * cols, dtype=torch.float32)
