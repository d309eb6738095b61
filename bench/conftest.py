"""Shared by the benches: threads, CPU time, the machine's peak, one line of facts per result.

    make bench
    pytest bench/bench_gram.py bench/bench_reconstruct.py --benchmark-quiet --benchmark-json=FILE

``LIAR_BENCH_THREADS`` sets the number of threads (1). Times are CPU time of the process, so that a
busy machine disturbs them less; with several threads they are wall time.
"""

import contextlib
import os
import time
from pathlib import Path

THREADS = int(os.environ.get("LIAR_BENCH_THREADS", "1"))
os.environ["OPENBLAS_NUM_THREADS"] = str(THREADS)  # read when torch loads numpy, and by scipy

import pytest  # noqa: E402
import torch  # noqa: E402
from peak import measured_peaks  # noqa: E402

from liar_ext.system.environment import process_memory  # noqa: E402

OURS = ("ours", "one+holdout")  # what the others of a group are compared with


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def peaks(tmp_path_factory):
    """Peak GFLOP/s of one core by dtype, measured now; empty without a compiler."""
    return measured_peaks(tmp_path_factory.mktemp("peak"))


def reset_peak_memory():
    """Let the peak of memory start anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def measure(benchmark, peaks):
    """Time a call and note GFLOP/s of the work needed, its share of peak, and peak memory."""

    def run(call, *, flops, dtype, rounds=7):
        benchmark._timer = time.process_time if THREADS == 1 else time.perf_counter
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        rate = flops / benchmark.stats.stats.min / 1e9
        benchmark.extra_info["gflops"] = round(rate, 1)
        if peaks:
            benchmark.extra_info["share_of_peak"] = round(rate / peaks[dtype] / THREADS, 3)
            benchmark.extra_info["peak_gflops"] = peaks[dtype]
        benchmark.extra_info["peak_memory_mib"] = process_memory(peak=True) >> 20
        benchmark.extra_info["threads"] = THREADS

    return run


def pytest_terminal_summary(terminalreporter, config):
    """Print one table: times, rates of the work needed, and ratios to ours in the same group."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"best times; {THREADS} thread")
    write(f"{'':60} {'ms':>10} {'x ours':>7} {'GFLOP/s':>8} {'of peak':>8} {'peak MiB':>9}")
    ours = {
        bench.group: bench.stats.min
        for bench in session.benchmarks
        if bench.group and (bench.params or {}).get("contender") in OURS
    }
    for bench in session.benchmarks:
        info, best = bench.extra_info, bench.stats.min
        memory = f"{info['peak_memory_mib']:9,}"
        if "forwards" in info:
            of_forward = f"{info['forwards']:.2f} forward passes, {info['memory_growth_mib']:,} MiB"
            write(
                f"{bench.name:60} {best * 1e3:10.0f} {memory:>34} ({of_forward} more than before)"
            )
            continue
        ratio = f"{best / ours[bench.group]:.2f}" if bench.group in ours else ""
        share = f"{100 * info['share_of_peak']:.1f} %" if "share_of_peak" in info else ""
        rate = f"{info['gflops']:8.1f} {share:>8} {memory}"
        write(f"{bench.name:60} {best * 1e3:10.3f} {ratio:>7} {rate}")
