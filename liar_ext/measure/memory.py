"""Peaks of resident memory, each of a process that does nothing but load and run one model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from liar_ext.checkpoint import load_model
from liar_ext.environment import child, process_memory
from liar_ext.errors import InputError, one_line
from liar_ext.measure.timing import Settings, check_models, run_once, use_threads

PATIENCE = 3600  # seconds that one process may take


def peak_memory(name: str, settings: Settings) -> dict[str, int]:
    """Return the greatest resident memory in bytes of a process that runs a model.

    By stage: after ``load``, and after the inputs of each batch size, smallest first, under its
    number; ``device`` is the memory taken of a GPU. Empty where the system doesn't tell.

    Raises
    ------
    InputError
        If the model can't be loaded or run there.
    """
    try:
        done = subprocess.run(
            child(__file__),
            input=json.dumps({"name": name, **asdict(settings)}),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"bench: a process that loads and runs {name} took more than {PATIENCE} s; give fewer "
            "--new-tokens or smaller --batch"
        ) from error
    answer = done.stdout.splitlines()[-1:] if done.returncode == 0 else []
    if not answer:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        reason = "it was killed, for lack of memory?" if done.returncode < 0 else said[-1]
        raise InputError(
            f"bench: the memory of {name} can't be measured: {one_line(RuntimeError(reason))}; "
            "give smaller --batch, or --no-memory"
        )
    found = json.loads(answer[0])
    if "refused" in found:
        raise InputError(found["refused"])
    return found


def main() -> None:
    """Run the job on standard input; print the peaks of memory, or what is wrong with the input."""
    job = json.loads(sys.stdin.read())
    name = job.pop("name")
    try:
        answer: dict[str, Any] = run(name, Settings(**job))
    except InputError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


def run(name: str, settings: Settings) -> dict[str, int]:
    """Load and run a model; return the peaks of memory of this process."""
    peaks: dict[str, int] = {}
    with use_threads(settings.threads):
        model = load_model(name, settings.dtype, settings.device)[0]
        check_models({"model": model}, settings)
        peaks["load"] = process_memory(peak=True)
        for batch in sorted(settings.batches):
            run_once(model, batch, settings, time.perf_counter)
            peaks[str(batch)] = process_memory(peak=True)
    if settings.device.startswith("cuda"):
        peaks["device"] = torch.cuda.max_memory_allocated(settings.device)
    return {stage: peak for stage, peak in peaks.items() if peak}


if __name__ == "__main__":
    main()
