"""The operators on CUDA beside cuBLAS, torch.linalg and the peers' way: needs a GPU.

`python bench/bench_cuda.py [--tokens 262144] [--only gram] [--json FILE] [--write docs/cuda.md]`.
Every number is the median of CUDA event timings, with a cold L2 and with a warm one; the ceilings
of the machine are measured first, in the same run. Ways of one job do equal work: float64 sums in
every Gram matrix, errors in every solve. Each job ends in a verdict, ours beside the best other
way. A way that this torch or this memory does not allow is reported as such.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from liar_ext import ops
from liar_ext.ops import backends, reference

SHAPES = {
    "Llama-3.2-1B o_proj": 2048,
    "Llama-3.2-3B o_proj": 3072,
    "Llama-2-7B o_proj, Llama-3-8B o_proj": 4096,
    "Qwen3-14B o_proj": 5120,
    "Llama-2-7B down_proj": 11008,
    "Llama-3-8B down_proj": 14336,
}
D_OUT = 4096
CHUNK = 8192  # tokens a call: what a calibration batch brings
EVICTED = 512 << 20  # bytes written before each run, more than any L2
F64 = {"device": "cuda", "dtype": torch.float64}


def median_ms(job, repeats=7, cold=True):
    """Time `job`, with everything evicted from L2 before each run if ``cold``."""
    flush = torch.empty(EVICTED if cold else 0, dtype=torch.uint8, device="cuda")
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
    """Time one call of CHUNK tokens for each way, and scale to `tokens`.

    Every way adds to float64 sums of a triangle or more, as jobs keep them.
    """
    x = torch.randn(CHUNK, d, device="cuda").to(torch.bfloat16)
    gram, total = torch.zeros(d, d, **F64), torch.zeros(d, **F64)
    count = torch.zeros(2, **F64)
    mask = torch.rand(CHUNK, device="cuda") > 0.1
    wide = x.float()

    def half():
        gram.add_(torch.mm(x.mT, x, out_dtype=torch.float32))

    def peers():
        y = x.float()
        gram.add_(y.mT @ y)

    ways = {
        f"ours, {backend} bf16": lambda update=update: update(gram, total, count, x)
        for backend, update in backends.gram_backends(x.device).items()
    }
    ways |= {
        "chosen, 10 % padding": lambda: ops.gram_update_(gram, total, count, x, None, mask),
        "chosen, f32": lambda: ops.gram_update_(gram, total, count, wide),
        "torch.mm bf16 to f32, add": half,
        "peers: float(), mm, add": peers,
    }
    needed = CHUNK * d * (d + 1)
    for way, job in ways.items():
        yield measured(
            f"gram, d = {d} ({name})",
            way,
            job,
            lambda ms: {
                f"s for {tokens} tokens": ms / 1e3 * tokens / CHUNK,
                "TFLOP/s needed": needed / ms / 1e9,
                "of bf16 matmul": needed / ms / 1e9 / peak,
            },
        )


def measured(job, way, call, numbers=lambda ms: {}, repeats=7):
    """Time one way, or say why it can't run."""
    try:
        ms = median_ms(call, repeats)
    except (RuntimeError, TypeError) as error:  # out of memory is one
        return {"job": job, "way": way, "not run": str(error).splitlines()[0]}
    finally:
        torch.cuda.empty_cache()
    warm = median_ms(call, repeats, cold=False)
    return {"job": job, "way": way, "ms": ms, "warm ms": warm, **numbers(ms)}


def verdict(rows):
    """Return one line on a job: ours beside the fastest other way that did the same work."""
    timed = [row for row in rows if "ms" in row and not row.get("other work")]
    ours = [row for row in timed if row["way"].startswith("ours")]
    others = [row for row in timed if not row["way"].startswith(("ours", "chosen"))]
    if not ours or not others:
        return f"{rows[0]['job']}: no verdict, a side is missing"
    best, other = (min(some, key=lambda row: row["ms"]) for some in (ours, others))
    ratio = other["ms"] / best["ms"]
    word = "faster" if ratio > 1.05 else "slower" if ratio < 0.95 else "level"
    return f"{best['job']}: {best['way']} is {word}, {ratio:.2f}x of {other['way']}"


def gram_of(d, *batch):
    """Return a well-conditioned Gram matrix."""
    x = torch.randn(*batch, 2 * d, d, **F64)
    return x.mT @ x


def reconstruct_rows(d, peak):
    """Time ladders of one and eight beside torch.linalg in float64, which is cuSOLVER."""
    gram, weight = gram_of(d), torch.randn(D_OUT, d, **F64)
    kept = torch.randperm(d, device="cuda")[: int(d * 0.8)].sort().values
    stays = torch.zeros(d, dtype=torch.bool, device="cuda")
    stays[kept] = True
    n = len(kept)

    def ours(count, holdout, errors_only=False):
        damps = torch.logspace(-5, 0, count, **F64)
        return lambda: ops.reconstruct(weight, gram, kept, damps, holdout, errors_only=errors_only)

    def linalg():
        """Solve, and the error of the layer: what `ours, one damp` does without cleverness."""
        removed = weight[:, ~stays]
        rhs = gram[kept][:, ~stays] @ removed.mT
        block = gram[kept][:, kept]
        shifted = block + block.diagonal().mean() * torch.eye(n, **F64)
        x = torch.cholesky_solve(rhs, torch.linalg.cholesky_ex(shifted).L)
        error = (removed @ gram[~stays][:, ~stays] * removed).sum()
        return weight[:, kept] + x.mT, error - 2 * (x * rhs).sum() + (x * (block @ x)).sum()

    fewest = min(D_OUT, d - n)
    solve = n**3 / 3 + 2 * n**2 * fewest + 4 * n * (d - n) * D_OUT
    full = n**3 / 3 + 4 * n**2 * D_OUT + 2 * n * (d - n) * D_OUT
    ways = {
        "ours, one damp": (ours(1, None), solve),
        "ours, eight damps, held-out errors alone": (ours(8, gram, True), 0),
        "torch.linalg, with the error": (linalg, full),
    }
    for way, (job, flops) in ways.items():
        row = measured(
            f"reconstruct, d = {d}, d_out = {D_OUT}, n = {n}",
            way,
            job,
            lambda ms, flops=flops: {
                "TFLOP/s": flops / ms / 1e9,
                "of f64 matmul": flops / ms / 1e9 / peak,
            },
            repeats=3,
        )
        yield row | ({} if flops else {"other work": True})


def small_rows(count, d, d_out, n):
    """Time many small systems: by our kernel, by torch.linalg, and by its batches."""
    gram, weight = gram_of(d, count), torch.randn(count, d_out, d, **F64)
    kept = torch.stack([torch.randperm(d, device="cuda")[:n].sort().values for _ in range(count)])
    damps = torch.logspace(-5, 0, 8, **F64)
    block = gram[:, :n, :n] + torch.eye(n, **F64)
    rhs = torch.randn(count, n, d_out, **F64)

    def linalg():
        for _ in damps:
            x = torch.cholesky_solve(rhs, torch.linalg.cholesky_ex(block).L)
            (x * (block @ x - 2 * rhs)).sum((1, 2))  # the errors

    ways = {
        "ours, a block a system": lambda: ops.reconstruct(weight, gram, kept, damps),
        "torch.linalg, a system at a time": lambda: reference.reconstruct(
            weight, gram, kept, damps
        ),
        "torch.linalg, batched, eight times": linalg,
    }
    for way, job in ways.items():
        yield measured(f"reconstruct, {count} × (n = {n}, d_out = {d_out}), 8 damps", way, job)


def curve_rows(d, width, steps):
    """Time eliminations beside the same in plain torch."""
    gram, weight = gram_of(d), torch.randn(D_OUT, d, **F64)
    units = d // width
    removed = min(steps, units)
    whole = {"ours, all units": 0} if removed < units else {}
    ways = {f"ours, {removed} units": units - removed, **whole}
    for way, at_least in ways.items():
        call = lambda at_least=at_least: ops.obs_curve(weight, gram, width, 1e-2, at_least)  # noqa: E731
        row = measured(f"obs_curve, d = {d}, width = {width}", way, call, repeats=3)
        yield row | ({} if at_least == units - removed else {"other work": True})
    yield measured(
        f"obs_curve, d = {d}, width = {width}",
        f"plain torch, {removed} units",
        lambda: reference.obs_curve(weight, gram, width, 1e-2, units - removed),
        repeats=3,
    )


def jobs(found, tokens):
    """Yield (group, rows) of everything that is measured."""
    bf16, f64 = found["bf16 matmul TFLOP/s"], found["f64 matmul TFLOP/s"]
    for name, d in SHAPES.items():
        yield "gram", gram_rows(name, d, tokens, bf16)
    # Where cuSOLVER overtakes, if it does, shows between these sizes.
    for d in (256, 1024, 2048, *SHAPES.values()):
        yield "reconstruct", reconstruct_rows(d, f64)
    for n in (32, 64, 128, 129, 256):
        yield "small", small_rows(64, 2 * n, 1024, n)
    # Attention of Llama-2-7B (a head is 128) and Llama-3-8B (a KV group is 512), then MLPs.
    for d, width in ((4096, 128), (4096, 512), (4096, 1), (11008, 1), (14336, 1)):
        yield "curve", curve_rows(d, width, 64)


BEGIN, END = "<!-- table: make gpu -->", "<!-- end of the table of make gpu -->"


def table(card, verdicts):
    """Return the verdicts as Markdown."""
    lines = [f"Measured on {card} by `make gpu`.", "", "| job | verdict |", "|---|---|"]
    return "\n".join(lines + [f"| {one.replace(': ', ' | ', 1)} |" for one in verdicts])


def main():
    """Run everything, print one line a measurement and one verdict a job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--only", choices=["gram", "reconstruct", "small", "curve"])
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--write", help="put the verdicts into this page, between its marks")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda: needs a GPU and a CUDA build of torch")
    card = torch.cuda.get_device_name()
    found = ceilings()
    rows, verdicts = [], []
    print(card, {k: round(v, 2) for k, v in found.items()})
    for group, results in jobs(found, arguments.tokens):
        if arguments.only not in (None, group):
            continue
        own = []
        for row in results:
            own.append(row)
            numbers = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
            print(f"{row['job']:52} {row['way']:50} {row.get('not run') or numbers}", flush=True)
        rows += own
        verdicts.append(verdict(own))
        print(verdicts[-1], flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            results = {"card": card, "ceilings": found, "rows": rows, "verdicts": verdicts}
            json.dump({**results, "build": ops.build_info()}, file, indent=1)
    if arguments.write:
        page = Path(arguments.write)
        before, rest = page.read_text("utf-8").split(BEGIN)
        after = rest.split(END)[1]
        new = f"{before}{BEGIN}\n\n{table(card, verdicts)}\n\n{END}{after}"
        page.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
