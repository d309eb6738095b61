"""Workers of ``verify``, forked from one process that has imported torch and transformers.

Each answers as a fresh process does, without the seconds that imports take: what it is forked from
has no liar_ext, and does nothing else. As a script this file is that process: a line of JSON names
the files and the environment of a worker, and its exit code is the answer.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parents[1] / "liar_ext" / "export" / "verify_worker.py"
STILL = 500  # seconds
STREAMS = ("stdin", "stdout", "stderr")
FAMILIES = ("llama", "bert", "qwen3_moe")  # what most tests load


@functools.cache
def _parent() -> subprocess.Popen:
    """Start the process that workers are forked from."""
    command = [sys.executable, "-P", __file__]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    atexit.register(process.communicate)
    return process


def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess:
    """Do what ``subprocess.run`` does with the worker."""
    assert command[0] == sys.executable and command[-1] == str(WORKER)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in STREAMS]
        Path(files[0]).write_text(settings["input"])
        job = {"files": files, "env": settings["env"]}
        parent = _parent()
        print(json.dumps(job), file=parent.stdin, flush=True)
        code = int(parent.stdout.readline())
        said = (Path(file).read_text(errors="replace") for file in files[1:])
        return subprocess.CompletedProcess(command, code, *said)


def _answer(work: Callable[[], None], files: list[str], env: dict[str, str]) -> None:
    """Be a worker, and end: one that stands still, too, which says where."""
    faulthandler.register(signal.SIGALRM, file=2, chain=True)
    signal.alarm(STILL)
    code = 1
    try:
        for stream, (name, file) in enumerate(zip(STREAMS, files, strict=True)):
            opened = open(file, "w" if stream else "r")  # noqa: SIM115
            os.dup2(opened.fileno(), stream)
            setattr(sys, name, opened)
        os.environ.clear()
        os.environ.update(env)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Fork a worker for each line, until there are no more."""
    work = runpy.run_path(str(WORKER))["main"]
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert "liar_ext" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(work, **json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
