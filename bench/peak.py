"""The peak of one core by dtype, from a program that is compiled and run now."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "peak.cpp"


def measured_peaks(folder: Path) -> dict[torch.dtype, float]:
    """Return GFLOP/s by dtype; empty without a compiler. The program goes to ``folder``."""
    program = folder / "peak"
    try:
        subprocess.run(
            ["c++", "-std=c++17", "-O2", "-march=native", str(SOURCE), "-o", str(program)],
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    single, double, brain = (float(value) for value in output.split())
    return {
        torch.float16: single,  # multiplied in float32
        torch.bfloat16: brain or single,
        torch.float32: single,
        torch.float64: double,
    }
