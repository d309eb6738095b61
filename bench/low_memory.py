"""What a solve takes in low memory and in memory: private memory and CPU time.

Sums are those of random inputs, each feature correlated with the one before it, and one feature
in five goes. A thread looks at the private memory of the process every few milliseconds.

    OMP_NUM_THREADS=1 python bench/low_memory.py --features 4864 --outputs 896
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import parser_of

from liar_ext import Moments
from liar_ext.reconstruction import ridge
from liar_ext.reconstruction.ridge import Residual
from liar_ext.reconstruction.solve import solution_of

TOKENS = 1500  # at a time, four times for each fold


def main() -> None:
    """Print a line for each solve."""
    parser = parser_of(__doc__)
    parser.add_argument("--features", type=int, default=4864)
    parser.add_argument("--outputs", type=int, default=896)
    options = parser.parse_args()
    torch.set_num_threads(1)
    d, h = options.features, options.outputs
    moments, residual = sums(d, h)
    weight = torch.randn(h, d, generator=torch.Generator().manual_seed(1))
    kept = torch.arange(d)[torch.arange(d) % 5 != 0]
    for name, system, target in (
        ("one pass", ridge.System, None),
        ("one pass, low memory", ridge.SystemInFile, None),
        ("layerwise", ridge.System, residual),
        ("layerwise, low memory", ridge.SystemInFile, residual),
    ):
        given = system(weight, None, moments, kept, target)
        memory, seconds, found = measured(lambda g=given: solution_of(g, (0.0, 1.0)))
        print(
            f"{name}: {memory / 2**20:.0f} MiB, {memory / (8 * d * d):.2f} d², {seconds:.1f} s, "
            f"{found.path}, held-out error {found.holdout_error:.15g}",
            flush=True,
        )


def sums(d: int, h: int) -> tuple[Moments, Residual]:
    """Return sums over random inputs, and over the residual of a target."""
    generator = torch.Generator().manual_seed(0)
    moments, residual = Moments.zeros(d), Residual.zeros(d, h)
    used = torch.ones(TOKENS, dtype=torch.bool)
    for fold in (0, 0, 0, 0, 1, 1, 1, 1):
        x = torch.randn(TOKENS, d, generator=generator)
        x[:, 1:] += 0.5 * x[:, :-1].clone()
        moments.update(x, fold, used)
        residual.update(x, torch.randn(TOKENS, h, generator=generator), fold, used)
    return moments, residual


def private_memory() -> int:
    """Return the private memory of this process that is resident, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


def measured(call: Callable[[], object]) -> tuple[int, float, object]:
    """Return the peak of private memory above what there was, seconds of CPU, and the result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, done = private_memory(), threading.Event()
    peak = [before]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], private_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.thread_time()
    found = call()
    seconds = time.thread_time() - start
    done.set()
    watching.join()
    return peak[0] - before, seconds, found


if __name__ == "__main__":
    main()
