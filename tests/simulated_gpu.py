"""A pytest plugin, `-p simulated_gpu`: `cuda` is a device that the host simulates.

Builds csrc/testing/simulated_gpu.cpp and loads it before torch, which must not be there yet; then
liar_ext, and the launchers with the kernels that the host shim runs.
"""

import ctypes
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "csrc" / "testing" / "build.py"


def _load() -> ctypes.CDLL:
    assert "torch" not in sys.modules, "the simulated GPU must be loaded before torch"
    command = [sys.executable, BUILD, "--simulate"]
    device, launchers = subprocess.check_output(command, text=True).split()
    ctypes.CDLL(device, mode=ctypes.RTLD_GLOBAL)
    import torch

    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.Event = _Event
    torch.cuda.mem_get_info = lambda device=None: (8 << 30, 8 << 30)
    # What is drawn there is drawn by the host's generator.
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.UntypedStorage.clone = _clone
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "a simulated GPU"
    torch.cuda.is_current_stream_capturing = lambda: False
    # Its clock would choose torch, which runs on the host, and no test would see a kernel.
    os.environ.setdefault("LIAR_GRAM", "csrc")
    os.environ.setdefault("LIAR_SOLVE", "csrc")
    # Registers the operators of the package first.
    dispatch = importlib.import_module("liar_ext.ops.dispatch")
    loaded = ctypes.CDLL(launchers)
    dispatch.KERNELS.add("CUDA")
    return loaded


class _Event:
    """A time, as everything before it is done."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.time - self.time)


def _clone(storage):
    """Copy a storage, for `copy.deepcopy`: torch without CUDA can't make one on such a device."""
    import torch

    data = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return data.set_(storage, 0, (storage.nbytes(),), (1,)).clone().untyped_storage()


launchers = _load()
