"""The memory that there is, whoever limits it: sums may take half of it."""

from __future__ import annotations

import pytest
from tiny import tiny

from liar_ext.calibration import saved_sums
from liar_ext.system import environment
from liar_ext.system.environment import available_memory, process_memory


@pytest.fixture
def machine(tmp_path):
    """Write files as a machine has them, by path below /."""

    def write(files: dict[str, str]) -> int | None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return available_memory(tmp_path / "proc", tmp_path / "cgroup")

    return write


MEMINFO = "MemTotal:       9000 kB\nMemFree:  1000 kB\nMemAvailable: 4000 kB\nCached: 5 kB\n"


def test_what_the_kernel_calls_available(machine):
    assert machine({"proc/meminfo": MEMINFO}) == 4000 << 10


def test_no_kernel_that_says_it(machine):
    assert machine({}) is None
    assert machine({"proc/meminfo": "nonsense\n\n"}) is None


def test_a_container_of_version_2(machine):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "cgroup/a/b/memory.max": "max\n",
        "cgroup/a/b/memory.current": "900000\n",
        "cgroup/a/memory.max": "1000000\n",
        "cgroup/a/memory.current": "900000\n",
        "cgroup/a/memory.stat": "anon 700000\ninactive_file 50000\n",
    }
    assert machine(files) == 150_000
    assert machine({"cgroup/a/memory.current": "2000000\n"}) == 0


def test_a_container_of_version_1_that_sees_itself_as_the_root(machine):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1\n",
        "cgroup/memory/memory.limit_in_bytes": "800000",
        "cgroup/memory/memory.usage_in_bytes": "300000",
    }
    assert machine(files) == 500_000


def test_this_machine_has_some():
    free = available_memory()
    assert free is None or 0 < free < 1 << 50


@pytest.mark.parametrize(("free", "room"), [(100, 50), (None, 1000), (10_000, 1000)])
def test_sums_take_half_of_what_is_free(monkeypatch, free, room):
    monkeypatch.setattr(saved_sums, "available_memory", lambda: free)
    model = tiny("llama")
    monkeypatch.setattr(saved_sums, "MEMORY", 1000)
    assert saved_sums.room_for_sums(model) == room
    assert saved_sums.room_for_sums(model, 70) == 70


@pytest.mark.parametrize("folder", ["proc", "missing"])
def test_a_process_knows_its_memory_and_its_peak(folder, machine, tmp_path, monkeypatch):
    machine({"proc/self/status": "Name: python\nVmHWM:\t 300 kB\nVmRSS:\t 200 kB\n"})
    monkeypatch.setattr(environment, "PROC", tmp_path / folder)
    now, peak = process_memory(), process_memory(peak=True)
    if folder == "proc":
        assert (now, peak) == (200 << 10, 300 << 10)
    else:
        assert 0 < now <= peak
