"""What a solve of one site takes in memory beside its sums, measured by the peak of a process.

For each kind of solve and each shape a fresh process makes sums over random tokens, notes its
resident memory, solves, and reads how far the peak of its resident memory rose. Printed are the
bytes, and what :func:`liar_ext.job.estimate.bytes_of_solve` allows for.

    python bench/solve_memory.py --shapes 2560x1024 1024x4096
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from liar_ext import ops
from liar_ext.calibration.taps import Moments
from liar_ext.job.estimate import PEAKS, bytes_of_solve
from liar_ext.reconstruction.ridge import Residual
from liar_ext.reconstruction.solve import solve
from liar_ext.selection.error_curves import error_curve
from liar_ext.system.environment import process_memory

TOKENS, KEEP = 256, 0.8
MIB = 2**20


def main() -> None:
    """Measure each kind at each shape, a process each, or one of them in this process."""
    options = parse()
    if options.one is not None:
        kind, d, outputs = options.one
        print(measure(kind, int(d), int(outputs)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    for shape in options.shapes:
        for kind in options.kinds:
            command = [sys.executable, __file__, "--one", kind, *shape.split("x")]
            out = subprocess.run(command, env=environment, capture_output=True, check=True)
            rose, allowed = int(out.stdout), bytes_of_solve(*map(int, shape.split("x")), [kind])
            said = f"{rose / MIB:.0f} MiB, {allowed / MIB:.0f} allowed for"
            print(f"{shape} {kind}: {said}", flush=True)


def measure(kind: str, d: int, outputs: int) -> int:
    """Return how many bytes the resident memory rose by at the peak of a solve."""
    generator = torch.Generator().manual_seed(0)
    moments, residual = Moments.zeros(d), Residual.zeros(d, outputs)
    weight = torch.randn(outputs, d, generator=generator).bfloat16()
    for fold in range(2):
        x = torch.randn(TOKENS, d, generator=generator)
        r = 0.1 * torch.randn(TOKENS, outputs, generator=generator)
        moments.update(x, fold)
        residual.update(x, r, fold, torch.ones(TOKENS))
    kept = torch.arange(int(KEEP * d))
    bias = torch.zeros(outputs)
    given = weight, bias if "affine" in kind else None, moments
    steps = {
        "linear": lambda: solve(*given, kept),
        "affine": lambda: solve(*given, kept),
        "towards": lambda: solve(*given, kept, target=residual, step=(0.0, 1.0)),
        "towards, affine": lambda: solve(*given, kept, target=residual, step=(0.0, 1.0)),
        "curve": lambda: curve(weight, moments),
        "obs": lambda: ops.obs_curve(weight, moments.pooled()[0], 1, 0.01, 0),
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = process_memory(peak=True)
    steps[kind]()
    return process_memory(peak=True) - before


def curve(weight: Tensor, moments: Moments) -> Tensor:
    """Return the error curve of one fold, judged on the other."""
    order = torch.arange(moments.d_in)
    return error_curve(weight.double(), moments.gram[0], order, 0.01, moments.gram[1])


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", default=["1024x4096", "2560x1024"], help="d_in x d_out")
    add("--kinds", nargs="+", default=list(PEAKS), choices=list(PEAKS))
    add("--one", nargs=3, help="kind, d_in and d_out, to measure in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
