"""Forks of this process, which has imported everything already: ranks without torchrun, too."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.distributed import TCPStore
from tqdm import tqdm

SECONDS = 600  # for a busy machine
STILL = 500  # of one fork, which then says where it stands and ends
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STORES = []
LIBC = ctypes.CDLL(None)
# Else each class of bars makes one for itself, shared by forks, at its first bar.
tqdm.set_lock(threading.RLock())


def begin_anew() -> None:
    """Let a fork have one thread, and a lock of progress bars that no other process has.

    Threads don't come along, and it would wait for them for ever; the lock of tqdm is shared by
    forks, and one that is killed can leave it taken. One that stands still nevertheless ends.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, file=2, chain=True)  # its timer would wait for a thread
    signal.alarm(STILL)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())


os.register_at_fork(after_in_child=begin_anew)


def start(count: int, call: Callable[[int], int | None], folder: Path) -> list[int]:
    """Return the processes of the ranks; each calls ``call`` with its rank, and prints to a file.

    The exit code is what the call returns.
    """
    given = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost"}
    given["CUDA_VISIBLE_DEVICES"] = ""  # a fork can't use a GPU
    given["TORCHELASTIC_USE_AGENT_STORE"] = True  # as torchrun, this process has the store
    port, told = os.pipe()

    def rank_of(rank: int) -> int | None:
        given["MASTER_PORT"], given["RANK"] = int(os.read(port, 5)), rank
        os.environ |= {name: str(value) for name, value in given.items()}
        return call(rank)

    processes = [
        fork(partial(rank_of, rank), folder / f"out{rank}", folder / f"err{rank}")
        for rank in range(count)
    ]
    # None connects before all are forked: the store's thread would look up its name, and a fork
    # of that moment has the lock of names taken for good.
    STORES.append(TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
    os.write(told, f"{STORES[-1].port:05}".encode() * count)
    os.close(port)
    os.close(told)
    return processes


def fork(call: Callable[[], int | None], out: Path | None = None, err: Path | None = None) -> int:
    """Return the process of a fork, which ends with what the call returns, whatever comes.

    It may print to files. Signals wait until it can take them, and it takes them as a command does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process
    code = 99
    try:
        if out is not None:
            print_to(out, err or out)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = call() or 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def print_to(out: Path, err: Path) -> None:
    """Let this process print into files, or one, and read nothing."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def cramp(spare: int) -> None:
    """Let this process have ``spare`` bytes more, and no large block that it once gave back."""

    def private() -> int:
        return int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]) << 10

    before = private()
    while private() == before:  # as long as one is served from what was freed
        LIBC.malloc(ctypes.c_size_t(16 << 20))
    resource.setrlimit(resource.RLIMIT_DATA, (private() + spare, resource.RLIM_INFINITY))


def end(process: int, seconds: float = SECONDS) -> int | None:
    """Return the exit code of a fork, minus the signal that ended it; None if it is killed now."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def wait(processes: list[int]) -> list[int | None]:
    """Return how each of the ranks ended."""
    deadline = time.monotonic() + SECONDS
    return [end(process, max(deadline - time.monotonic(), 0.1)) for process in processes]


def run(count: int, call: Callable[[int], int | None], folder: Path) -> list[int | None]:
    """Start ranks and wait for them."""
    return wait(start(count, call, folder))
