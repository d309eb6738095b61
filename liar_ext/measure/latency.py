"""Measure the seconds of every site by its units, in the model that they are sites of.

A module that is timed alone, again and again, finds its weights in the cache. So whole models run,
whose blocks have different sizes: one round of a mixed model, every site at another size::

    round 0    block 0: 32    block 1: 544    block 2: 1056    block 3: 1536    block 4: 32 ...
    round 1    block 0: 544   block 1: 1056   block 2: 1536    block 3: 32      block 4: 544 ...

Sites of one shape share their samples; the dense model runs between the rounds. What a run takes
besides its sites is the fixed part.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from liar_ext.measure.latency_table import LatencyTable, SizeRow
from liar_ext.measure.speed import (
    SEED,
    Clock,
    Quartiles,
    check_length,
    inputs_of,
    machine,
    now,
    step_of,
)
from liar_ext.models.plan import Budget, Plan, SitePlan
from liar_ext.models.registry import type_of
from liar_ext.models.running import device_of, evaluating, predicts_next_token
from liar_ext.models.sites import Site, attn_unit_of, sites
from liar_ext.models.slicing import allowed_counts, apply_plan
from liar_ext.models.whole import refuse_experts
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar, showing_bars

SIZES = 7  # of one shape, at most: seconds lie between on a line
SAMPLES = 24  # of each size of a shape: as many runs as give these
MOST_RUNS = 5  # of a mixed model, prompts or new tokens, after one that is not timed
RUNS_COMPARED = 2  # the same, where whole models are compared
COMPARED = 5  # rounds in which a whole plan is timed beside the dense model


def measure_latency(
    model: nn.Module,
    budget: Budget,
    at: Sequence[Site] | None = None,
    *,
    clock: Clock | None = None,
    progress: bool = False,
) -> LatencyTable:
    """Measure what the model and each of its sites take, by the units that they keep.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is as it was afterwards. Slices of its weights are held beside it for a
        while.
    budget : Budget
        What is timed (fields ``latency_...``), and which sizes there are (``tile``).
    at : sequence of Site, optional
        The sites; all by default.
    clock : callable, optional
        What time it is, in seconds. On a GPU, sites are timed by its own events.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        If the model has no such phase, or not so many positions, or lies on several devices.
    """
    at = sites(model) if at is None else list(at)
    if not at:
        raise InputError("latency: there is no site to measure; give at least one")
    refuse_experts(at, "latency: seconds by size are measured of", 'use of="flops"')
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise InputError(
            f"latency: the model must lie on one device, got {', '.join(sorted(devices))}"
        )
    shapes = defaultdict(list)
    for site in at:
        shapes[site.shape].append(site)
    sizes = {shape: _spread_out(allowed_counts(some[0], budget)) for shape, some in shapes.items()}
    phases = _phases(model, budget)
    with showing_bars(progress):
        samples = _samples(model, budget, phases, shapes, sizes, clock or clock_of(model))

    def request(statistic: Callable, *keys: object) -> float:
        """Return the seconds of a request, over its phases, by a statistic of samples."""
        total = 0.0
        for phase, found in samples.items():
            # A part of the model that these inputs don't reach costs nothing.
            values = [value for key in keys for value in found[key]] or [0.0]
            total += phases[phase] * statistic(values)
        return total

    rows = []
    for shape, some in shapes.items():
        keys = [[(site.name, count) for site in some] for count in sizes[shape]]
        rising = tuple(rising_means([request(median, *each) for each in keys]))
        spread = tuple(request(_half_spread, *each) for each in keys)
        rows.append(SizeRow(*shape, len(some), tuple(sizes[shape]), rising, spread))
    timed = " and ".join(phases) if predicts_next_token(model) else "a forward pass"
    return LatencyTable(
        phase=budget.latency_phase,
        batch=budget.latency_batch,
        prompt=budget.latency_prompt,
        new_tokens=budget.latency_new_tokens,
        fixed=max(0.0, request(median, "rest")),
        spread=request(_half_spread, "dense"),
        rows=tuple(rows),
        where=where(model) | {"timed": timed},
    )


def _samples(
    model: nn.Module,
    budget: Budget,
    phases: Iterable[str],
    shapes: Mapping[tuple, Sequence[Site]],
    sizes: Mapping[tuple, Sequence[int]],
    clock: Clock,
) -> dict[str, dict[Any, list[float]]]:
    """Return seconds by phase: of each site and count, of the ``rest``, and of the dense model."""
    at = [site for some in shapes.values() for site in some]
    draw = Random(SEED)
    places = {shape: draw.sample(range(len(some)), len(some)) for shape, some in shapes.items()}
    rounds = [
        {
            site.name: sizes[shape][(place + turn) % len(sizes[shape])]
            for shape, some in shapes.items()
            for place, site in zip(places[shape], some, strict=True)
        }
        for turn in range(max(map(len, sizes.values())))
    ]
    fewest = min(len(some) * len(rounds) // len(sizes[shape]) for shape, some in shapes.items())
    runs = min(max(1, -(-SAMPLES // max(1, fewest))), MOST_RUNS)
    samples = {phase: defaultdict(list) for phase in phases}
    with evaluating(model):
        for turn, counts in enumerate(Bar(rounds, desc="latency")):
            mixed = sliced(model, plan_of(model, at, counts))
            order = ((model, {s.name: s.units for s in at}), (mixed, counts))
            for each, kept in order if turn % 2 else order[::-1]:
                for phase, found in samples.items():
                    for whole, of_site in _runs(each, at, budget, phase, clock, runs):
                        for name, seconds in of_site.items():
                            found[name, kept[name]].append(seconds)
                        found["rest"].append(whole - sum(of_site.values()))
                        found["dense"] += [whole] if each is model else []
    return samples


def ratios(
    models: Mapping[str, nn.Module],
    budget: Budget,
    *,
    rounds: int = COMPARED,
    clock: Clock | None = None,
) -> dict[str, Quartiles]:
    """Return the seconds of models by those of ``dense``, in turns, by quartiles of the rounds."""
    phases, clock = _phases(models["dense"], budget), clock or clock_of(models["dense"])
    found: dict[str, list[float]] = {role: [] for role in models if role != "dense"}
    for turn in range(rounds):
        spent = {}
        for role in list(models) if turn % 2 else list(models)[::-1]:
            with evaluating(models[role]):
                spent[role] = 0.0
                for phase, times in phases.items():
                    runs = _runs(models[role], (), budget, phase, clock, RUNS_COMPARED)
                    spent[role] += times * median(whole for whole, _ in runs)
        for role, values in found.items():
            values.append(spent[role] / spent["dense"])
    return {role: Quartiles.of(values) for role, values in found.items()}


def clock_of(model: nn.Module) -> Clock:
    """Return the clock that fits a model: CPU time where one thread does all of the work.

    Other programs then take nothing from a measurement but cache and memory bandwidth. With several
    threads, or on a GPU, it is wall time.
    """
    alone = device_of(model).type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def sliced(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a model, sliced by a plan, that shares all weights which stay whole."""
    made = light_copy(model)
    apply_plan(made, plan)
    return made


def light_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def plan_of(model: nn.Module, at: Sequence[Site], counts: Mapping[str, int]) -> Plan:
    """Return a plan of some counts, for its sizes alone: the first units of every group stay."""
    plans = {site.name: SitePlan.first(site.units, counts[site.name], site.groups) for site in at}
    return Plan(type_of(model), attn_unit_of(at), plans)


def where(model: nn.Module) -> dict[str, object]:
    """Return what a measurement depends on beside its settings."""
    device = str(device_of(model))
    facts = {"device": device, "dtype": str(model.dtype).removeprefix("torch.")}
    facts["clock"] = clock_of(model).__name__
    return {**facts, "threads": torch.get_num_threads(), **machine(device)}


def rising_means(values: Sequence[float]) -> list[float]:
    """Return the nearest values that never fall, by least squares: those that do are pooled.

    The i-th is ``max_{j ≤ i} min_{k ≥ i} mean(values[j..k])``.
    """
    places = range(len(values))
    return [
        max(min(fmean(values[j : k + 1]) for k in places[i:]) for j in places[: i + 1])
        for i in places
    ]


def _spread_out(counts: Sequence[int]) -> list[int]:
    last = len(counts) - 1
    return sorted({counts[round(i * last / (SIZES - 1))] for i in range(SIZES)})


def _half_spread(values: Sequence[float]) -> float:
    found = Quartiles.of(values)
    return (found.high - found.low) / 2


def _phases(model: nn.Module, budget: Budget) -> dict[str, int]:
    """Return how often a request runs each phase: its prompt once, a step per token.

    One forward pass is the only phase of many models.
    """
    phase, generates = budget.latency_phase, predicts_next_token(model)
    if phase == "decode" and not generates:
        raise InputError(
            f"latency: decode needs a model that generates, got {type(model).__name__}; use "
            "latency_phase='prefill'"
        )
    times = {"prefill": 1, "decode": budget.latency_new_tokens if generates else 0}
    times = {each: count for each, count in times.items() if count and phase in (each, "both")}
    decoded = max(budget.latency_new_tokens, MOST_RUNS + 1) if "decode" in times else 0
    check_length(model, budget.latency_prompt, decoded, "latency")
    return times


@torch.no_grad()
def _runs(
    model: nn.Module, at: Sequence[Site], budget: Budget, phase: str, clock: Clock, count: int
) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield the seconds of some runs, and of the sites in each, after one that is not counted."""
    generates, context = predicts_next_token(model), budget.latency_prompt
    if phase == "decode":  # in the middle of the new tokens
        context += max(0, (budget.latency_new_tokens - MOST_RUNS - 1) // 2)
    inputs = inputs_of(model, budget.latency_batch, context)
    step = step_of(model) if generates else None
    state = (inputs.get("input_ids"), None)
    if phase == "decode":
        state = step(*state)
    for run in range(1 + count):
        with _stopwatch(model, at, clock) as read:
            start = now(model, clock)
            if phase == "decode":
                state = step(*state)
            elif generates:
                step(*state)
            else:
                model(**inputs)
            whole = now(model, clock) - start
        if run:
            yield whole, read()


@contextmanager
def _stopwatch(
    model: nn.Module, at: Sequence[Site], clock: Clock
) -> Iterator[Callable[[], dict[str, float]]]:
    """Time the sites while the context is open; then ask for their seconds.

    A site begins where the first of its producers starts, and ends where its consumer does.
    """
    (mark, between), starts, ends = _marks(model, clock), {}, {}

    def start(name: str, *_: object) -> None:
        if name not in starts:
            starts[name] = mark()

    def end(name: str, *_: object) -> None:
        ends[name] = mark()

    with ExitStack() as stack:
        for site in at:
            for producer in map(model.get_submodule, site.producers):
                stack.enter_context(producer.register_forward_pre_hook(partial(start, site.name)))
            consumer = model.get_submodule(site.consumer)
            stack.enter_context(consumer.register_forward_hook(partial(end, site.name)))
        yield lambda: {name: between(starts[name], ends[name]) for name in ends if name in starts}


def _marks(model: nn.Module, clock: Clock) -> tuple[Callable, Callable]:
    """Return how to mark a moment of the device, and the seconds between two."""
    if device_of(model).type != "cuda":
        return partial(now, model, clock), lambda first, last: last - first

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda first, last: first.elapsed_time(last) / 1000
