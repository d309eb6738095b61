"""The CUDA kernels compiled for the host, and numpy's view of 16-bit floats.

`LIAR_SANITIZE=1` takes the build with address and undefined-behaviour sanitizers; the process then
needs `LD_PRELOAD` of the sanitizer's library (see docs/cuda.md). `LIAR_HOST_KERNELS` names a module
that CMake has built.
"""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = os.environ.get("LIAR_SANITIZE", "0") == "1"
# For sizes that take minutes under sanitizers, where smaller ones run the same lines.
LARGE = pytest.mark.skipif(SANITIZED, reason="minutes under sanitizers")
DTYPES = ("bf16", "f16", "f32", "f64")


def build_script():
    """Return csrc/testing/build.py as a module."""
    path = ROOT / "csrc" / "testing" / "build.py"
    spec = importlib.util.spec_from_file_location("host_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _build() -> Path | subprocess.CalledProcessError:
    pytest.importorskip("pybind11")
    kind = "sanitized" if SANITIZED else "plain"
    try:
        return build_script().build(ROOT / "build" / "host_kernels" / kind, SANITIZED)
    except subprocess.CalledProcessError as error:
        return error  # so that it is tried once


@cache
def kernels():
    """Build (if out of date) and import the module; skip where there is no pybind11."""
    path = os.environ.get("LIAR_HOST_KERNELS") or _build()
    if isinstance(path, subprocess.CalledProcessError):
        pytest.fail(f"the host kernels do not compile: {path}")
    spec = importlib.util.spec_from_file_location("liar_host_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["liar_host_kernels"] = module
    spec.loader.exec_module(module)
    return module


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to `dtype`; bf16 comes as its bits in uint16."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    return x.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[dtype])


def widen(x: np.ndarray) -> np.ndarray:
    """Float64 values of what `narrow` made."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def guarded(x: np.ndarray, extra: int = 5) -> np.ndarray:
    """Return a copy of `x` with rows that are not contiguous, and NaNs wherever `x` is not."""
    nan = narrow(np.array([np.nan]), "bf16")[0] if x.dtype == np.uint16 else np.nan
    frame = np.full((x.shape[0] + 2, x.shape[1] + extra), nan, x.dtype)
    frame[1:-1, : x.shape[1]] = x
    return frame[1:-1, : x.shape[1]]
