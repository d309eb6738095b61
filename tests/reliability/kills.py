"""Kill a save at every step: the folder is absent, the old one, or the new one, and nothing stays.

A step is what the interpreter reports to an audit hook: a file opened, renamed, removed, a call of
the C library. The save is killed at each in turn, and at random times between them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked

import liar_ext
from liar_ext.checkpoint import placing
from liar_ext.checkpoint.folder import MANIFEST_FILE, digest, strangers
from reliability.outcome import Outcome, in_child

TITLE = "kills in the save phase"
FULL, SHORT = 240, 24
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
STRIDE = 37  # a prime: all steps are hit before one is hit again
STEPS = ("open", "os.", "shutil.", "ctypes.", "fcntl.")


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Kill ``count`` saves, half of them over an older folder, some without renameat2."""
    from folders import equal_plan, make_plan, pruned

    old, new = pruned("llama", make_plan), pruned("llama", equal_plan)
    configs = {}
    for name, (model, plan) in (("old", old), ("new", new)):
        liar_ext.save_pruned(model, work / name, plan)
        configs[name] = (work / name / "config.json").read_bytes()
    draw = random.Random(seed)
    steps, seconds = _count_steps(new, work / "counted")
    first = draw.randrange(steps)
    for number in range(count):
        home = work / f"{number:05}"
        home.mkdir()
        overwrite, atomic = bool(number % 2), number % 3 != 0
        sent = SIGNALS[number // 6 % 3]
        # Every step in turn, far ones first; every fourth kill is at any time.
        turn = first + STRIDE * (number - number // 4)
        step = None if number % 4 == 3 else turn % (steps + 4)
        if overwrite:
            liar_ext.save_pruned(*_arguments(old, home), report=None)
        case = f"{number} {sent.name} at {'any time' if step is None else f'step {step}'}" + (
            f"{', overwriting' if overwrite else ''}{'' if atomic else ', without renameat2'}"
        )
        delay = 0.01 + draw.random() * 1.2 * seconds  # the child has begun by then
        start = time.monotonic()
        _kill_a_save(new, home / "pruned", overwrite, atomic, sent, step, delay)
        yield _judge(case, home, configs, overwrite, atomic, new, time.monotonic() - start)


def _judge(case, home: Path, configs: dict, overwrite, atomic, new, seconds) -> Outcome:
    """Look at what the kill has left, save once more, and look again.

    Without an exchange there is a moment with the old folder beside its place only; the next start
    puts it back.
    """
    folder = home / "pruned"
    there, verdict = folder.exists(), "done"
    left = _which(folder, configs)
    if left == "half":
        verdict = "data lost"
    elif left == "nothing" and overwrite and atomic:
        verdict, left = "data lost", "nothing of the old folder"
    kind, answer, _ = in_child(lambda: _start_again(home, overwrite, there, new))
    if verdict == "data lost":
        pass
    elif kind != "value":
        verdict, left = ("traceback" if kind == "error" else kind), answer
    elif answer != ["pruned"]:
        verdict, left = "left behind", answer
    elif _which(folder, configs) != "new":
        verdict, left = "data lost", "no complete folder by the next save"
    return Outcome(TITLE, case, f"left {left}", verdict, seconds)


def _which(folder: Path, configs: dict[str, bytes]) -> str:
    """Tell what a folder is: nothing, half of one, or all of the old or the new one."""
    if not folder.exists():
        return "nothing"
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        whole = all(digest(folder / name) == value for name, value in files.items())
        config = (folder / "config.json").read_bytes()
    except (OSError, ValueError):
        return "half"
    whole = whole and not strangers(folder)
    return next((name for name, each in configs.items() if whole and each == config), "half")


def _start_again(home: Path, overwrite: bool, there: bool, new) -> list[str]:
    """Start another run at the same place, and return what lies there when it is done."""
    if overwrite and not there:  # the old folder must come back before anything else
        placing.clean_leftovers(home / "pruned")
        assert (home / "pruned").exists(), "the old folder is lost"
    liar_ext.save_pruned(*_arguments(new, home), overwrite=overwrite or there)
    return sorted(os.listdir(home))


def _kill_a_save(new, folder: Path, overwrite, atomic, sent, step, delay) -> None:
    """Save in a child that is killed at a step, or after a delay."""

    def save() -> None:
        if not atomic:
            placing._renameat2 = lambda *arguments: False
        if step is not None:
            _die_at(step, sent)
        liar_ext.save_pruned(*_arguments(new, folder.parent), overwrite=overwrite)

    child = forked.fork(save, Path(os.devnull))
    if step is None:
        time.sleep(delay)
        os.kill(child, sent)
    forked.end(child)


def _die_at(step: int, sent: signal.Signals) -> None:
    left = [step]

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(STEPS):
            if left[0] == 0:
                os.kill(os.getpid(), sent)
            left[0] -= 1

    sys.addaudithook(hook)


def _count_steps(new, home: Path) -> tuple[int, float]:
    """Return how many steps, and seconds, a save over another one has."""

    def count() -> tuple[int, float]:
        home.mkdir()
        liar_ext.save_pruned(*_arguments(new, home))
        steps = [0]

        def hook(event: str, arguments: tuple) -> None:
            steps[0] += event.startswith(STEPS)

        sys.addaudithook(hook)
        start = time.monotonic()
        liar_ext.save_pruned(*_arguments(new, home), overwrite=True)
        return steps[0], time.monotonic() - start

    kind, answer, _ = in_child(count)
    assert kind == "value", answer
    return answer


def _arguments(job: tuple, home: Path) -> tuple:
    model, plan = job
    return model, home / "pruned", plan
