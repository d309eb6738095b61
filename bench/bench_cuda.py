"""CUDA kernels beside cuBLAS, torch.linalg and the peers' way, on real shapes: needs a GPU.

`python bench/bench_cuda.py [--tokens 262144] [--json FILE]`. Every number is the median of CUDA
event timings with a cold L2; the ceilings of the machine are measured first, in the same run.
"""

import argparse
import json
import statistics
import sys

import torch

from liar_ext import ops

SHAPES = {
    "Llama-2-7B o_proj, Llama-3-8B o_proj": 4096,
    "Llama-2-7B down_proj": 11008,
    "Llama-3-8B down_proj": 14336,
}
CHUNK = 8192  # tokens a call: what a calibration batch brings


def median_ms(job, repeats=7):
    """Time `job` with everything evicted from L2 before each run."""
    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    job()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        job()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def ceilings():
    """Measure TFLOP/s of the largest matmuls and TB/s of a copy."""
    found = {}
    for name, dtype in [("bf16", torch.bfloat16), ("f32", torch.float32), ("f64", torch.float64)]:
        n = 8192 if dtype == torch.bfloat16 else 4096
        a = torch.randn(n, n, device="cuda").to(dtype)
        found[f"{name} matmul TFLOP/s"] = 2 * n**3 / median_ms(lambda a=a: a @ a) / 1e9
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    found["copy TB/s"] = 2 * x.numel() / median_ms(lambda: y.copy_(x)) / 1e9
    return found


def gram_rows(name, d, tokens, peak):
    """Time one call of CHUNK tokens for each way, and scale to `tokens`."""
    x = torch.randn(CHUNK, d, device="cuda").to(torch.bfloat16)
    gram = torch.zeros(d, d, device="cuda")
    total, count = torch.zeros(d, device="cuda"), torch.zeros(2, device="cuda", dtype=torch.float64)
    mask = torch.rand(CHUNK, device="cuda") > 0.1
    wide = x.float()

    def peers():
        y = x.float()
        gram.add_(y.mT @ y)

    ways = {
        "ours bf16": lambda: ops.gram_update_(gram, total, count, x),
        "ours bf16, 10 % padding": lambda: ops.gram_update_(gram, total, count, x, None, mask),
        "ours f32": lambda: ops.gram_update_(gram, total, count, wide),
        "torch.mm bf16 to bf16 (no Gram)": lambda: torch.mm(x.mT, x),
        "addmm_ f32": lambda: gram.addmm_(wide.mT, wide),
        "peers: float(), mm, add": peers,
    }
    needed = CHUNK * d * (d + 1)
    for way, job in ways.items():
        ms = median_ms(job)
        rate = needed / ms / 1e9
        yield {
            "job": f"gram, d = {d} ({name})",
            "way": way,
            "ms": ms,
            f"s for {tokens} tokens": ms / 1e3 * tokens / CHUNK,
            "TFLOP/s needed": rate,
            "of bf16 matmul": rate / peak,
        }


def reconstruct_rows(d, d_out, keep):
    """Time a ladder of one and of eight beside torch.linalg in float64."""
    x = torch.randn(2 * d, d, device="cuda", dtype=torch.float64)
    gram = x.mT @ x
    del x
    weight = torch.randn(d_out, d, device="cuda", dtype=torch.float64)
    kept = torch.randperm(d, device="cuda")[: int(d * keep)].sort().values
    stays = torch.zeros(d, dtype=torch.bool, device="cuda")
    stays[kept] = True
    rhs = gram[kept][:, ~stays] @ weight[:, ~stays].mT
    block = gram[kept][:, kept] + torch.eye(len(kept), device="cuda", dtype=torch.float64)

    def linalg():
        factor, _ = torch.linalg.cholesky_ex(block)
        torch.cholesky_solve(rhs, factor)

    def ours(count, holdout):
        damps = torch.logspace(-5, 0, count, device="cuda", dtype=torch.float64)
        return lambda: ops.reconstruct(weight, gram, kept, damps, holdout)

    ways = {
        "torch.linalg cholesky_ex + cholesky_solve": linalg,
        "ours, one damp": ours(1, None),
        "ours, eight damps with held-out errors": ours(8, gram),
    }
    for way, job in ways.items():
        job_name = f"reconstruct, d = {d}, d_out = {d_out}, n = {len(kept)}"
        yield {"job": job_name, "way": way, "ms": median_ms(job, repeats=3)}


def main():
    """Run everything and print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or ops.build_info()["cuda"] != "compiled":
        sys.exit("bench_cuda: needs a GPU, a CUDA build of torch and liar_ext with LIAR_CUDA=1")
    card = torch.cuda.get_device_name()
    found = ceilings()
    rows = []
    print(card, {k: round(v, 2) for k, v in found.items()})
    jobs = [
        *(
            gram_rows(n, d, arguments.tokens, found["bf16 matmul TFLOP/s"])
            for n, d in SHAPES.items()
        ),
        *(reconstruct_rows(d, 4096, 0.8) for d in SHAPES.values()),
    ]
    for job in jobs:
        for row in job:
            rows.append(row)
            numbers = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
            print(f"{row['job']:48} {row['way']:42} {numbers}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"card": card, "ceilings": found, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
