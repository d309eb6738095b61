"""The whole benchmark: memory, then both models side by side."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.loading import placement
from liar_ext.measure.memory import peak_memory
from liar_ext.measure.timing import (
    Benchmark,
    Clock,
    ModelFacts,
    Settings,
    check_models,
    measure,
    use_threads,
)


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
        models = {
            role: load_model(name, settings.dtype, settings.device)[0]
            for role, name in names.items()
        }
        check_models(models, settings)
        facts = {
            role: ModelFacts(names[role], *_sizes(model), peaks[role])
            for role, model in models.items()
        }
        rates = measure(models, settings, clock=clock, progress=progress)
        threads = torch.get_num_threads()
    return Benchmark(
        pruned=facts["pruned"],
        dense=facts.get("dense"),
        settings={**asdict(settings), "batches": list(settings.batches), "threads": threads},
        machine=machine(settings.device),
        rates=rates,
    )


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Return the parameters of a model, tied ones once, and their bytes."""
    parameters = list(model.parameters())
    return sum(each.numel() for each in parameters), sum(each.nbytes for each in parameters)


def machine(device: str) -> dict[str, str]:
    """Return what a measurement depends on beside its settings."""
    names = ("liar_ext", "torch", "transformers")
    found = {name: version(name) for name in names}
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
