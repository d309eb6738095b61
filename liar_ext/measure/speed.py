"""The whole benchmark: both models side by side, and the memory of each in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.loading import placement
from liar_ext.environment import child, process_memory
from liar_ext.errors import InputError, one_line
from liar_ext.measure.timing import (
    Benchmark,
    Clock,
    ModelFacts,
    Settings,
    check_models,
    measure,
    run_once,
    use_threads,
)

PATIENCE = 3600  # seconds that one process may take


def benchmark(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    settings: Settings,
    *,
    memory: bool = True,
    clock: Clock = time.perf_counter,
    progress: bool = False,
) -> Benchmark:
    """Measure a pruned model beside a dense one, or alone.

    Prefill: the prompt's tokens by the seconds until the first token is known, which are the
    first-token latency. Decode: greedy tokens after it, one at a time, with a key-value cache.
    Models that predict no next token: inputs by second.

    Parameters
    ----------
    folder, against : path or str
        The pruned model and the dense one, whatever :func:`liar_ext.checkpoint.load_model` takes;
        None measures the first alone.
    settings : Settings
        How.
    memory : bool
        Measure resident memory too, each model in a process of its own.
    clock : callable
        What time it is, in seconds.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        If one of them can't be loaded or they do different things, or the numbers don't fit.
    """
    placement(settings.device)  # refuses one that is not there
    names = {"pruned": os.fspath(folder)}
    if against is not None:
        names["dense"] = os.fspath(against)
    # First, while this process holds no model.
    peaks = {role: peak_memory(name, settings) if memory else {} for role, name in names.items()}
    with use_threads(settings.threads):
        models, facts = {}, {}
        for role, name in names.items():
            model = models[role] = load_model(name, settings.dtype, settings.device)[0]
            weights = list(model.parameters())  # tied ones once
            sizes = sum(each.numel() for each in weights), sum(each.nbytes for each in weights)
            facts[role] = ModelFacts(name, *sizes, peaks[role])
        check_models(models, settings)
        rates = measure(models, settings, clock=clock, progress=progress)
        threads = torch.get_num_threads()
    return Benchmark(
        pruned=facts["pruned"],
        dense=facts.get("dense"),
        settings={**asdict(settings), "batches": list(settings.batches), "threads": threads},
        machine=machine(settings.device),
        rates=rates,
    )


def machine(device: str) -> dict[str, str]:
    """Return what a measurement depends on beside its settings."""
    found = {name: version(name) for name in ("liar_ext", "torch", "transformers")}
    found |= {"python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count())}
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def peak_memory(name: str, settings: Settings) -> dict[str, int]:
    """Return the greatest resident memory in bytes of a process that runs a model.

    By stage: after ``load``, and after the inputs of each batch size, smallest first, under its
    number; ``device`` is the memory taken of a GPU. Empty where the system doesn't tell. InputError
    if the model can't be loaded or run there.
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
            f"bench: the memory of {name} can't be measured: {one_line(reason)}; give smaller "
            "--batch, or --no-memory"
        )
    found = json.loads(answer[0])
    if "refused" in found:
        raise InputError(found["refused"])
    return found


def _own_peaks(name: str, settings: Settings) -> dict[str, int]:
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


def _answer() -> None:
    """Run the job on standard input; print the peaks of memory, or what is wrong with the input."""
    job = json.loads(sys.stdin.read())
    name = job.pop("name")
    try:
        answer: dict[str, Any] = _own_peaks(name, Settings(**job))
    except InputError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _answer()
