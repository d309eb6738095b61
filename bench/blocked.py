"""What a solve takes by blocks in a file, beside the ordinary one: private memory and CPU time.

Sums are those of random inputs, each feature correlated with the one before it, and one feature
in five goes. A thread looks at the private memory of the process every few milliseconds.

    OMP_NUM_THREADS=1 python bench/blocked.py --features 4864 --outputs 896
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from liar_ext import Moments
from liar_ext.reconstruction import blocked, ridge, targets
from liar_ext.reconstruction.targets import Shortfall

TOKENS = 1500  # at a time, four times for each fold


def main() -> None:
    """Print a line for each solve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=4864)
    parser.add_argument("--outputs", type=int, default=896)
    options = parser.parse_args()
    torch.set_num_threads(1)
    d, h = options.features, options.outputs
    moments, shortfall = sums(d, h)
    weight = torch.randn(h, d, generator=torch.Generator().manual_seed(1))
    kept = torch.arange(d)[torch.arange(d) % 5 != 0]
    one_pass, layerwise = (weight, None, moments, kept), (weight, None, moments, shortfall, kept)
    for name, solve, given in (
        ("one pass", ridge.solve, one_pass),
        ("one pass, by blocks", blocked.solve, one_pass),
        ("layerwise", targets.solve_towards, layerwise),
        ("layerwise, by blocks", blocked.solve_towards, layerwise),
    ):
        memory, seconds, found = measured(lambda s=solve, g=given: s(*g))
        print(
            f"{name}: {memory / 2**20:.0f} MiB, {memory / (8 * d * d):.2f} d², {seconds:.1f} s, "
            f"{found.path}, held-out error {found.holdout_error:.15g}",
            flush=True,
        )


def sums(d: int, h: int) -> tuple[Moments, Shortfall]:
    """Return sums over random inputs, and over a target's shortfall."""
    generator = torch.Generator().manual_seed(0)
    moments, shortfall = Moments.zeros(d), Shortfall.zeros(d, h)
    used = torch.ones(TOKENS, dtype=torch.bool)
    for fold in (0, 0, 0, 0, 1, 1, 1, 1):
        x = torch.randn(TOKENS, d, generator=generator)
        x[:, 1:] += 0.5 * x[:, :-1].clone()
        moments.update(x, fold, used)
        shortfall.update(x, torch.randn(TOKENS, h, generator=generator), fold, used)
    return moments, shortfall


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
