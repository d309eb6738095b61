"""Memory: what a thread can't get is an error, and what a call took goes back."""

import subprocess
import sys
from textwrap import dedent

import pytest
from covers import some

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def child(code):
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@LINUX
@some("threads", [1, 2], 2)
def test_a_task_without_memory_is_an_error(threads):
    """Two sites are solved on two threads; what one of them throws must come out."""
    said, after = child(f"""
        import resource, torch
        from liar_ext import ops
        torch.set_num_threads({threads})
        weight = torch.ones(2, 2, 1500, dtype=torch.float64)
        gram = torch.eye(1500, dtype=torch.float64).expand(2, -1, -1)
        kept = torch.arange(1499).expand(2, -1)
        damps = torch.tensor([0.1], dtype=torch.float64)
        few = weight[..., :9].contiguous(), gram[:, :9, :9], kept[:, :8].contiguous(), damps
        ops.reconstruct(*few, errors_only=True)  # starts the threads
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + (4 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, -1))
        try:
            print(ops.reconstruct(weight, gram, kept, damps, errors_only=True))
        except (MemoryError, RuntimeError) as error:  # torch 2.15 hands on no other
            print("refused:", error)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        print(ops.reconstruct(weight, gram, kept, damps, errors_only=True)[1].tolist())
    """)
    assert said.startswith("refused: liar_ext: out of memory") and "free some" in said
    assert after == "[[2.0], [2.0]]"


@LINUX
def test_what_a_call_took_goes_back():
    """Of some 200 MiB little stays; the C library may keep some of what it is given back."""
    (line,) = child("""
        import torch
        from liar_ext import ops
        torch.set_num_threads(2)
        def resident():
            return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) >> 10
        def peak():
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
        n = 2400
        gram = torch.eye(n, dtype=torch.float64).expand(2, -1, -1)
        weight = torch.ones(1, dtype=torch.float64).expand(2, 300, n).contiguous()
        kept = torch.arange(0, n - 400).expand(2, -1)
        damps = torch.tensor([0.1, 0.2], dtype=torch.float64)
        before = resident()
        ops.reconstruct(weight, gram, kept, damps, gram, errors_only=True)
        print(peak() - before, resident() - before)
    """)
    took, kept = map(int, line.split())
    assert took > 120
    assert kept < 60
