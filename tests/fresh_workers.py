"""Processes without liar_ext, forked from one that has imported torch and transformers.

Each answers as a fresh process does, without the seconds that imports take: what it is forked from
has no liar_ext, and does nothing else. As a script this file is that process: a line of JSON names
the files, the environment and the script of a fork, and its exit code is the answer. Without a
script the fork is a worker of ``verify``. The worker of llama.cpp is a script.
"""

from __future__ import annotations

import atexit
import contextlib
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

EXPORT = Path(__file__).parents[1] / "liar_ext" / "export"
WORKER, LLAMA_CPP = EXPORT / "verify_worker.py", EXPORT / "llama_cpp_worker.py"
STILL = 500  # seconds
STREAMS = ("stdin", "stdout", "stderr")
FAMILIES = ("llama", "bert", "qwen3_moe")  # what most tests load
LIBRARY = "llama_cpp_py_sync"  # whose OpenMP begins in the fork


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
    """Do what ``subprocess.run`` does with a worker."""
    if str(LLAMA_CPP) in command:
        arguments = command[command.index(str(LLAMA_CPP)) :]
        code = f"import runpy; runpy.run_path({arguments[0]!r}, run_name='__main__')"
        return _run(arguments, settings["env"], code)
    assert command[0] == sys.executable and command[-1] == str(WORKER)
    return _run(command, settings["env"], given=settings["input"])


def run_script(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Do what ``python -c`` does where torch and transformers are imported first."""
    return _run(["-c", *map(str, arguments)], dict(os.environ), code)


def _run(
    command: list[str], env: dict[str, str], code: str = "", given: str = ""
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in STREAMS]
        Path(files[0]).write_text(given)
        job = {"files": files, "env": env, "code": code, "argv": command, "cwd": os.getcwd()}
        parent = _parent()
        print(json.dumps(job), file=parent.stdin, flush=True)
        ended = int(parent.stdout.readline())
        said = (Path(file).read_text(errors="replace") for file in files[1:])
        return subprocess.CompletedProcess(command, ended, *said)


def _answer(
    work: Callable[[], None],
    files: list[str],
    env: dict[str, str],
    code: str,
    argv: list[str],
    cwd: str,
) -> None:
    """Be a worker, or a script, and end: one that stands still, too, which says where."""
    faulthandler.register(signal.SIGALRM, file=2, chain=True)
    signal.alarm(STILL)
    ended = 1
    try:
        for stream, (name, file) in enumerate(zip(STREAMS, files, strict=True)):
            opened = open(file, "w" if stream else "r")  # noqa: SIM115
            os.dup2(opened.fileno(), stream)
            setattr(sys, name, opened)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        if code:
            sys.argv = argv
            exec(code, {"__name__": "__main__"})
        else:
            work()
        ended = 0
    except SystemExit as error:
        ended = error.code if isinstance(error.code, int) else 1
        print(error.code if ended else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)


def serve() -> None:
    """Fork a worker for each line, until there are no more."""
    work = runpy.run_path(str(WORKER))["main"]
    for name in (*(f"transformers.models.{each}.modeling_{each}" for each in FAMILIES), LIBRARY):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "liar_ext" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(work, **json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
