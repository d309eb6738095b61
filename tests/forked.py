"""Forks of this process, which has imported everything already: ranks without torchrun, too."""

from __future__ import annotations

import os
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
STORES = []


def begin_anew() -> None:
    """Let a fork have one thread, and a lock of progress bars that no other process has.

    Threads don't come along, and it would wait for them for ever; the lock of tqdm is shared by
    forks, and one that is killed can leave it taken.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())


os.register_at_fork(after_in_child=begin_anew)


def start(count: int, call: Callable[[int], int | None], folder: Path) -> list[int]:
    """Return the processes of the ranks; each calls ``call`` with its rank, and prints to a file.

    The exit code is what the call returns.
    """
    STORES.append(TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
    given = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": STORES[-1].port}
    given["CUDA_VISIBLE_DEVICES"] = ""  # a fork can't use a GPU
    given["TORCHELASTIC_USE_AGENT_STORE"] = True  # as torchrun, this process has the store

    def rank_of(rank: int) -> int | None:
        os.environ |= {name: str(value) for name, value in given.items()}
        os.environ |= {"RANK": str(rank), "MASTER_ADDR": "localhost"}
        return call(rank)

    return [
        fork(partial(rank_of, rank), folder / f"out{rank}", folder / f"err{rank}")
        for rank in range(count)
    ]


def fork(call: Callable[[], int | None], out: Path, err: Path) -> int:
    """Return the process of a fork, which prints to files and ends with what the call returns."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        print_to(out, err)
        code = call() or 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def print_to(out: Path, err: Path) -> None:
    """Let this process print into files, or one."""
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def wait(processes: list[int]) -> list[int]:
    """Return the exit codes of the ranks, minus the signal where one ended a rank."""
    codes, deadline = {}, time.monotonic() + SECONDS
    while len(codes) < len(processes):
        for process in set(processes) - codes.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(process, 9)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def run(count: int, call: Callable[[int], int | None], folder: Path) -> list[int]:
    """Start ranks and wait for them."""
    return wait(start(count, call, folder))
