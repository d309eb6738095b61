"""Speed and memory of two models, in turns; memory in a process of its own.

The order changes from round to round, so that other work of the machine falls on both.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.loading import placement
from liar_ext.models.running import (
    device_of,
    draw_inputs,
    inputs_read,
    positions_of,
    predicts_next_token,
)
from liar_ext.system.environment import child, process_memory
from liar_ext.system.errors import InputError, one_line
from liar_ext.system.progress import Bar

BENCH_VERSION = 1
BENCH_MARK = f'{{\n "version": {BENCH_VERSION},\n "pruned": '  # begins a file of ours
SEED = 0
Clock = Callable[[], float]


@dataclass(frozen=True)
class Quartiles:
    """Median, first and third quartile of what the rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of values, by linear interpolation between neighbours."""
        return cls(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())


@dataclass(frozen=True)
class Rate:
    """One thing that was timed: of both models, and pruned / dense round by round."""

    batch: int
    what: str
    unit: str
    pruned: Quartiles
    dense: Quartiles
    ratio: Quartiles


@dataclass(frozen=True)
class ModelFacts:
    """A model of a benchmark; ``peak`` is what :func:`peak_memory` returns."""

    name: str
    params: int | None = None
    weight_bytes: int | None = None
    peak: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What ``liar bench`` measured."""

    pruned: ModelFacts
    dense: ModelFacts
    # SHA-256 of the report of the pruned folder, by which it is known again; "" without one.
    report_digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # how it was measured
    machine: dict[str, str] = field(default_factory=dict)  # and where
    rates: list[Rate] = field(default_factory=list)

    def to_json(self) -> str:
        """Return it as strict JSON."""
        facts = {"version": BENCH_VERSION, **asdict(self)}
        return json.dumps(facts, indent=1, allow_nan=False) + "\n"

    def rate(self, what: str, batch: int | None = None) -> Rate | None:
        """Return the rate of a name, of one batch size or of the smallest that there is."""
        found = [each for each in self.rates if each.what == what and batch in (None, each.batch)]
        return min(found, key=lambda each: each.batch, default=None)


@dataclass(frozen=True)
class Settings:
    """How a benchmark is made."""

    rounds: int = 5  # that are timed, after one that is not
    prompt_length: int = 128  # tokens of a prompt, or of a sentence
    new_tokens: int = 32  # tokens that are decoded after it
    batches: tuple[int, ...] = (1, 32)  # batch sizes, each of which is measured
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None  # of torch on the CPU; None leaves them as they are


def benchmark(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str],
    settings: Settings,
    *,
    memory: bool = True,
) -> Benchmark:
    """Measure a pruned model beside a dense one.

    Prefill: the prompt's tokens by the seconds until the first token is known, which are the
    first-token latency. Decode: greedy tokens after it, one at a time, with a key-value cache.
    Models that predict no next token: inputs by second. With ``memory`` each model is also run in a
    process of its own.
    """
    placement(settings.device)  # refuses one that is not there
    names = {"pruned": os.fspath(folder), "dense": os.fspath(against)}
    # First, while this process holds no model.
    peaks = {role: peak_memory(name, settings) if memory else {} for role, name in names.items()}
    models, facts, before = {}, {}, torch.get_num_threads()
    threads = settings.threads or before
    torch.set_num_threads(threads)
    try:
        for role, name in names.items():
            model = models[role] = load_model(name, settings.dtype, settings.device)[0]
            weights = list(model.parameters())  # tied ones once
            sizes = sum(each.numel() for each in weights), sum(each.nbytes for each in weights)
            facts[role] = ModelFacts(name, *sizes, peaks[role])
        check_models(models, settings)
        rates = measure(models, settings)
    finally:
        torch.set_num_threads(before)
    return Benchmark(
        **facts,
        settings={**asdict(settings), "batches": list(settings.batches), "threads": threads},
        machine=machine(settings.device),
        rates=rates,
    )


def measure(
    models: Mapping[str, nn.Module],
    settings: Settings,
    *,
    clock: Clock = time.perf_counter,
) -> list[Rate]:
    """Return the rates of two models that are loaded: ``pruned`` and ``dense``.

    Round 0 warms up and is not counted; then models take turns in going first.
    """
    found: list[Rate] = []
    for batch in settings.batches:
        rounds = []
        for turn in Bar(range(settings.rounds + 1)):
            roles = list(models) if turn % 2 else list(models)[::-1]
            rounds.append({r: run_once(models[r], batch, settings, clock) for r in roles})
        for what, unit in rounds[0]["dense"]:
            pruned, dense = (
                [each[role][what, unit] for each in rounds[1:]] for role in ("pruned", "dense")
            )
            ratios = [ours / theirs for ours, theirs in zip(pruned, dense, strict=True)]
            found.append(Rate(batch, what, unit, *map(Quartiles.of, (pruned, dense, ratios))))
    return found


@torch.no_grad()
def run_once(
    model: nn.Module, batch: int, settings: Settings, clock: Clock
) -> dict[tuple[str, str], float]:
    """Run a model once; return what was found by name and unit."""
    inputs = inputs_of(model, batch, settings.prompt_length)
    if not predicts_next_token(model):
        start = now(model, clock)
        model(**inputs)
        spent = now(model, clock) - start
        return {("encode", "inputs/s"): batch / spent}
    step = step_of(model)
    ids = inputs["input_ids"]
    start = now(model, clock)
    token, cache = step(ids, None)
    first = now(model, clock)
    for _ in range(settings.new_tokens):
        token, cache = step(token, cache)
    last = now(model, clock)
    return {
        ("prefill", "tokens/s"): ids.numel() / (first - start),
        ("first token", "ms"): 1000 * (first - start),
        ("decode", "tokens/s"): batch * settings.new_tokens / (last - first),
    }


def step_of(model: nn.Module) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """Return a function from tokens and a cache to the next token, greedily, and the cache."""
    known = inspect.signature(model.forward).parameters
    short = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    name = "cache" if "cache" in known else "past_key_values"  # the older name

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=ids, use_cache=True, **{name: cache}, **short)
        return output.logits[:, -1:].argmax(-1), output[name]

    return step


def inputs_of(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """Return random inputs, the same for every model of a kind."""
    generator = torch.Generator().manual_seed(SEED)
    device, config = device_of(model), model.config.get_text_config()
    # Not the last tokens, which multimodal models keep for images.
    vocabulary = max(1, getattr(config, "vocab_size", 0) // 2)
    drawn = draw_inputs(model, batch, tokens, generator, vocabulary)
    inputs = {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in drawn.items()
    }
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def now(model: nn.Module, clock: Clock) -> float:
    """Return the time when all that was asked of the model's device is done."""
    device = device_of(model).type
    if device in ("cuda", "mps", "xpu"):
        getattr(torch, device).synchronize()
    return clock()


def check_models(models: Mapping[str, nn.Module], settings: Settings) -> None:
    """Refuse models that do different things, and numbers that they can't have."""
    kinds = {(each.main_input_name, predicts_next_token(each)) for each in models.values()}
    if len(kinds) > 1:
        named = ", ".join(f"{role} {type(model).__name__}" for role, model in models.items())
        raise InputError(
            f"bench: both models must do the same with the same inputs, got {named}; give the "
            "model that was pruned as --against"
        )
    for model in models.values():
        check_length(model, settings.prompt_length, settings.new_tokens)


def check_length(model: nn.Module, prompt: int, new_tokens: int, operation: str = "bench") -> None:
    """Raise InputError if a model that reads tokens has fewer positions than a request takes."""
    reads, positions = any(n.endswith("_ids") for n in inputs_read(model)), positions_of(model)
    needed = prompt + (new_tokens if predicts_next_token(model) else 0)
    if reads and positions is not None and needed > positions:
        raise InputError(
            f"{operation}: {type(model).__name__} has {positions} positions, and prompt and new "
            f"tokens take {needed}; give a smaller prompt length, or fewer new tokens"
        )


def machine(device: str) -> dict[str, str]:
    """Return what a measurement depends on beside its settings."""
    found = {name: version(name) for name in ("liar_ext", "torch", "transformers")}
    found |= {"python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count())}
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else platform.machine()


def peak_memory(name: str, settings: Settings) -> dict[str, int]:
    """Return the greatest resident memory in bytes of a process that runs a model.

    By stage: after ``load``, and after the inputs of each batch size, smallest first, under its
    number; ``device`` is the memory taken of a GPU.
    """
    job = json.dumps({"name": name, **asdict(settings)})
    done = subprocess.run(child(__file__), input=job, capture_output=True, text=True)
    answer = done.stdout.splitlines()[-1:] if done.returncode == 0 else []
    if not answer:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        reason = "it was killed, for lack of memory?" if done.returncode < 0 else reason
        raise InputError(
            f"bench: the memory of {name} can't be measured: {one_line(reason)}; give smaller "
            "--batch, or --no-memory"
        )
    found = json.loads(answer[0])
    if "refused" in found:
        raise InputError(found["refused"])
    return found


def _answer(name: str, **settings: Any) -> dict[str, Any]:
    """Return the peaks of memory, or what is wrong with the input."""
    asked, peaks = Settings(**settings), {}
    try:
        torch.set_num_threads(asked.threads or torch.get_num_threads())
        model = load_model(name, asked.dtype, asked.device)[0]
        check_models({"model": model}, asked)
        peaks["load"] = process_memory(peak=True)
        for batch in sorted(asked.batches):
            run_once(model, batch, asked, time.perf_counter)
            peaks[str(batch)] = process_memory(peak=True)
    except InputError as error:
        return {"refused": str(error)}
    if asked.device.startswith("cuda"):
        peaks["device"] = torch.cuda.max_memory_allocated(asked.device)
    return peaks


if __name__ == "__main__":
    print(json.dumps(_answer(**json.loads(sys.stdin.read()))))
