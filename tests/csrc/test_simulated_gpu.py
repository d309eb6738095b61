"""The tests of a CUDA device, run on a simulated one, which is tested itself here."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        sys.platform != "linux" or torch.backends.cuda.is_built(),
        reason="the simulation wants a build of torch for the CPU, on Linux",
    ),
]
START = """
from simulated_gpu import launchers
import ctypes, torch
from liar_ext import ops

def sums(d, device):
    shapes = (d, d), (d,), (2,)
    return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python where `simulated_gpu` can be imported."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS)


def script(text: str) -> subprocess.CompletedProcess:
    return run("-c", START + dedent(text))


@pytest.mark.parametrize("chosen", ["on_a_gpu", "test_cuda_jobs"], ids=["operators", "jobs"])
def test_what_is_tested_on_a_gpu(chosen):
    files = ["csrc/test_cuda_build.py", "csrc/test_cuda_jobs.py"]
    plugins = ["-p", "simulated_gpu", "-p", "no:cacheprovider"]
    done = run("-m", "pytest", *plugins, *files, "-k", chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


def test_launches_follow_the_device_of_their_tensors():
    """The current device is the first; a launch there could not even read the second's memory."""
    done = script("""
        x = torch.randn(9, 5, device="cuda:1")
        gram, total, count = sums(5, "cuda:1")
        ops.gram_update_(gram, total, count, x)
        torch.testing.assert_close(gram, (x.double().T @ x.double()).tril(), rtol=1e-5, atol=1e-5)
        print(gram.device, count.tolist())
    """)
    assert done.stdout == "cuda:1 [9.0, 0.0]\n", done.stderr


def test_operators_wait_for_no_value():
    """Nor can a graph be captured of what waits. float32 sums are widened on the device."""
    done = script("""
        count_waits = ctypes.CDLL("libtorch_cuda.so").liar_count_waits
        x, kept = torch.randn(40, 12, device="cuda"), torch.arange(0, 12, 2, device="cuda")
        damps = torch.tensor([0.1, torch.inf], dtype=torch.float64, device="cuda")
        gram, weight = x.T @ x, torch.randn(5, 12, device="cuda")
        moments, mask, turned = sums(12, "cuda"), x[:, 0] > 0, x.T.contiguous().T
        before = count_waits()
        ops.gram_update_(*moments, turned, None, mask)
        ops.reconstruct(weight, gram, kept, damps, gram)
        ops.reconstruct(weight[None], gram[None], kept[None], damps, errors_only=True)
        ops.obs_curve(weight, gram, 1, 0.1, 0)
        ops.obs_curve(weight, gram, 4, 0.1, 1)
        print(count_waits() - before)
        gram[0, 0].item()
        print(count_waits() - before)
    """)
    assert done.stdout == "0\n1\n", done.stderr


def test_tensors_of_two_devices_are_refused():
    done = script("""ops.gram_update_(*sums(5, "cuda:1"), torch.ones(9, 5, device="cuda:0"))""")
    assert "gram must be on the CUDA device of x; move it with .to(device)" in done.stderr


@pytest.mark.parametrize(
    ("code", "words", "hint"),
    [
        (209, "no kernel image is available", "rebuild with LIAR_CUDA_ARCHS"),
        (35, "CUDA driver version is insufficient", "update the driver, or rebuild with its CUDA"),
    ],
)
def test_what_cuda_says_is_passed_on_with_what_to_do(code, words, hint):
    done = script(f"""
        eye = torch.eye(4, device="cuda")
        launchers.liar_refuse_launches({code})
        try:
            ops.obs_curve(eye, eye, 1, 0.1, 0)
        except RuntimeError as error:
            print(error)
        launchers.liar_refuse_launches(0)
        print(ops.obs_curve(eye, eye, 1, 0.1, 0)[0].tolist())
    """)
    said, *_, order = done.stdout.splitlines()
    assert f'obs_curve: CUDA says "{words}' in said and hint in said
    assert order == "[0, 1, 2, 3]"


def test_a_host_that_reads_the_memory_of_a_device_ends():
    done = script("""ctypes.string_at(torch.ones(9, device="cuda").data_ptr(), 4)""")
    assert done.returncode == -11


def test_a_kernel_that_writes_past_an_allocation_is_noticed():
    done = script("""
        gram, total, count = sums(5, "cuda")
        short = torch.zeros(24, dtype=torch.float64, device="cuda")
        gram.set_(short.untyped_storage(), 0, (5, 5), (5, 1))
        ops.gram_update_(gram, total, count, torch.ones(9, 5, device="cuda"))
        del gram, short
    """)
    assert done.returncode == -6 and "a write past the end of 192 bytes" in done.stderr


def test_fresh_memory_holds_nans():
    assert script("print(torch.empty(2, device='cuda').tolist())").stdout == "[nan, nan]\n"
