"""The shim that runs CUDA kernels on the host: right where they are right, and loud where not."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from host_kernels import SANITIZED, build_script, kernels

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("unchanged")]


def run(name, size=64, n=0, inputs=None, **launch):
    x = np.arange(1, 65, dtype=np.float32) if inputs is None else inputs.astype(np.float32)
    out = np.zeros(size, np.float32)
    kernels().run_fault(name, x, out, n, **launch)
    return x, out


ORDERS = (0, 1, 2, 3)


@pytest.mark.parametrize("order", ORDERS)
def test_barrier(order):
    kernels().configure(order=order)
    x, out = run("rotate")
    assert np.array_equal(out, np.roll(x, -1))


def test_missing_barrier_gives_a_wrong_result():
    x, out = run("rotate_unguarded")
    assert not np.array_equal(out, np.roll(x, -1))


def test_planted_removal_of_a_barrier():
    run("rotate")
    (site,) = kernels().synchronization_sites()
    kernels().configure(removed={site})
    x, out = run("rotate")
    assert not np.array_equal(out, np.roll(x, -1))


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("divergent_barrier", 0, r"divergent barrier.*bind_faults\.cpp:\d+.*bind_faults\.cpp:\d+"),
        ("forgotten_threads", 40, r"deadlock in block \(0,0,0\): 40 .*bind_faults\.cpp:\d+, 24 "),
        ("half_a_shuffle", 0, r"deadlock.*__shfl_xor_sync at bind_faults\.cpp:\d+, 32 have ended"),
        ("divergent_shuffles", 0, r"divergent __shfl_xor_sync.*bind_faults\.cpp:\d+"),
    ],
)
def test_divergence_and_deadlock_are_named(name, n, message):
    with pytest.raises(RuntimeError, match=message):
        run(name, n=n)
    x, out = run("rotate")  # and the next launch is none the worse
    assert np.array_equal(out, np.roll(x, -1))


def test_shared_memory_beyond_48_kib_is_asked_for():
    x, out = run("rotate", shared=99 << 10)
    assert np.array_equal(out, np.roll(x, -1))


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"shared": (99 << 10) + 1}, "invalid argument"),
        ({"rows": 65536}, "invalid configuration"),
        ({"threads": 1056}, "invalid configuration"),
    ],
    ids=str,
)
def test_launches_that_a_gpu_refuses(launch, message):
    """Shared memory is that of the smallest cards, 99 KiB a block."""
    with pytest.raises(RuntimeError, match=f'rotate: CUDA says "{message}'):
        run("rotate", **launch)
    x, out = run("rotate")
    assert np.array_equal(out, np.roll(x, -1))


@pytest.mark.parametrize("order", ORDERS)
def test_shuffle_within_masks(order):
    kernels().configure(order=order)
    x, out = run("masked_shuffle")
    assert np.array_equal(out, x[np.arange(64) ^ 2])


def test_atomics_and_grid():
    x, out = run("atomic_sum", blocks=3)
    assert out[0] == 3 * x.sum() and out[1] == 3


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_that_count_on_their_order_are_wrong_in_another(order):
    kernels().configure(order=order)
    x, out = run("chained_blocks", blocks=9)
    assert np.array_equal(out[:9], np.arange(9)) == (order == 0)


@pytest.mark.parametrize("order", ORDERS)
def test_block_sum_used_twice(order):
    kernels().configure(order=order)
    x, out = run("block_total")
    assert np.all(out == 3 * x.sum())


@pytest.mark.parametrize("late", [True, False])
def test_asynchronous_copies(late):
    kernels().configure(late_copies=late)
    x, out = run("async_rotate", inputs=np.arange(256))
    assert np.array_equal(out, x[(4 * np.arange(64) + 7) % 256])


@pytest.mark.parametrize("what", ["cp.async.wait_group", "cp.async.commit_group", "__syncthreads"])
def test_missing_wait_reads_what_is_not_there(what):
    run("async_rotate", inputs=np.arange(256))
    (site,) = (s for s in kernels().synchronization_sites() if s.startswith(what))
    kernels().configure(removed={site})
    x, out = run("async_rotate", inputs=np.arange(256))
    assert not np.array_equal(out, x[(4 * np.arange(64) + 7) % 256])


def test_misaligned_copy_is_refused():
    with pytest.raises(RuntimeError, match="not a multiple"):
        run("misaligned_async", inputs=np.arange(257))


def test_reading_one_too_many_meets_the_guard():
    x = np.append(np.ones(64), np.nan)
    _, out = run("copy_one_too_many", n=64, inputs=x)
    assert np.isnan(out[0])


@pytest.mark.skipif(not SANITIZED, reason="needs LIAR_SANITIZE=1")
@pytest.mark.parametrize(("name", "size"), [("shared_overrun", 64), ("copy_one_too_many", 64)])
def test_sanitizer_ends_an_overrun(name, size):
    code = (
        f"import test_host_shim as t; t.run({name!r}, size={size}, n={int(name[0] == 's') or 64})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


def test_threads_must_fill_warps():
    with pytest.raises(RuntimeError, match="multiple of 32"):
        run("rotate", threads=33)


def integers(rng, shape):
    return rng.integers(-8, 9, shape).astype(np.float32)  # exact in every format


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["bf16", "tf32", "f64"])
def test_fragment_layouts(kind):
    rng = np.random.default_rng(kind)
    x, y = integers(rng, (16, 16)), integers(rng, (16, 8))
    both = np.concatenate([x.ravel(), y.ravel()])
    _, out = run("fragments", size=128, n=kind, inputs=both, threads=32)
    assert np.array_equal(out.reshape(16, 8), x @ y)
    kernels().configure(swapped_fragments=True)
    _, out = run("fragments", size=128, n=kind, inputs=both, threads=32)
    assert not np.array_equal(out.reshape(16, 8), x @ y)


def test_one_process_at_a_time_builds_in_a_folder(tmp_path):
    """Two that test beside each other need the same libraries."""
    alone, entered = build_script().alone, threading.Event()

    def another():
        with alone(tmp_path):
            entered.set()

    with alone(tmp_path):
        thread = threading.Thread(target=another)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(30)
    thread.join()
