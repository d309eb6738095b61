"""Time models that are loaded, in turns.

The order changes from round to round, so that what else the machine does falls on both; a ratio is
taken within a round, and its quartiles say how steady it was.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.calibration.texts import check_seq_len
from liar_ext.errors import InputError
from liar_ext.models.running import device_of, draw_inputs, inputs_read, predicts_next_token
from liar_ext.progress import Bar
from liar_ext.untrusted import count, listing, mapping, named, number, read_object, record, text

VERSION = 1
MOST_ROWS = 100


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
    dense: Quartiles | None = None
    ratio: Quartiles | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model of a benchmark: its name, parameters, bytes of weights, and peaks of memory.

    ``peak`` is what :func:`liar_ext.measure.speed.peak_memory` returns.
    """

    name: str
    params: int | None = None
    weight_bytes: int | None = None
    peak: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What ``liar bench`` measured."""

    pruned: ModelFacts
    dense: ModelFacts | None = None  # None where the pruned one was measured alone
    # SHA-256 of the report of the pruned folder, by which it is known again; "" without one.
    report_digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # how it was measured
    machine: dict[str, str] = field(default_factory=dict)  # and where
    rates: list[Rate] = field(default_factory=list)

    def to_json(self) -> str:
        """Return it as strict JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def rate(self, what: str, batch: int | None = None) -> Rate | None:
        """Return the rate of a name, of one batch size or of the smallest that there is."""
        found = [each for each in self.rates if each.what == what and batch in (None, each.batch)]
        return min(found, key=lambda each: each.batch, default=None)


def bench_file(folder: str | os.PathLike[str]) -> Path:
    """Return where the benchmark of a folder is stored: beside it, for the folder is sealed."""
    path = Path(folder).resolve()
    return path.with_name(f"{path.name}.bench.json")


def read_bench(path: Path, operation: str = "report") -> Benchmark:
    """Return a stored benchmark; what is missing, or no number, is left out.

    InputError if the file is none.
    """
    fields, _ = read_object(path, operation)
    if fields.get("version") != VERSION or not isinstance(fields.get("rates"), list):
        raise InputError(
            f"{operation}: {path} is no benchmark of version {VERSION}; write it by liar bench"
        )
    rates = [_stored_rate(mapping(row)) for row in listing(fields["rates"])[:MOST_ROWS]]
    return Benchmark(
        pruned=_model(fields.get("pruned")),
        dense=_model(fields["dense"]) if mapping(fields.get("dense")) else None,
        report_digest=text(fields.get("report_digest"), 64),
        settings=named(fields.get("settings")),
        machine=named(fields.get("machine")),
        rates=[rate for rate in rates if rate is not None],
    )


def _stored_rate(row: Any) -> Rate | None:
    batch, pruned = count(row.get("batch")), _quartiles(row.get("pruned"))
    if batch is None or pruned is None:
        return None
    dense, ratio = _quartiles(row.get("dense")), _quartiles(row.get("ratio"))
    return Rate(batch, text(row.get("what"), 40), text(row.get("unit"), 40), pruned, dense, ratio)


def _quartiles(value: Any) -> Quartiles | None:
    found = record(value, **dict.fromkeys(("median", "low", "high"), number))
    return Quartiles(**found) if found and min(found.values()) >= 0 else None


def _model(value: Any) -> ModelFacts:
    facts = mapping(value)
    peak = {key: each for key, each in named(facts.get("peak")).items() if count(each) is not None}
    sizes = (count(facts.get(name)) for name in ("params", "weight_bytes"))
    return ModelFacts(text(facts.get("name"), 200), *sizes, peak)


SEED = 0
Clock = Callable[[], float]


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


def measure(
    models: Mapping[str, nn.Module],
    settings: Settings,
    *,
    clock: Clock = time.perf_counter,
    progress: bool = False,
) -> list[Rate]:
    """Return the rates of models that are loaded: ``pruned``, and ``dense`` if it is there.

    Round 0 warms up and is not counted; then models take turns in going first.
    """
    found: list[Rate] = []
    bar = Bar(total=len(settings.batches) * (settings.rounds + 1), disable=not progress)
    for batch in settings.batches:
        values: dict[tuple[str, str], dict[str, list[float]]] = {}
        for turn in range(settings.rounds + 1):
            for role in list(models) if turn % 2 else list(models)[::-1]:
                for key, value in run_once(models[role], batch, settings, clock).items():
                    if turn:
                        values.setdefault(key, {}).setdefault(role, []).append(value)
            bar.update()
        for (what, unit), by_role in values.items():
            given = [by_role["pruned"]]
            if "dense" in by_role:
                pairs = zip(by_role["pruned"], by_role["dense"], strict=True)
                given += [by_role["dense"], [ours / theirs for ours, theirs in pairs]]
            found.append(Rate(batch, what, unit, *map(Quartiles.of, given)))
    bar.close()
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
    kinds = {
        role: (model.main_input_name, predicts_next_token(model)) for role, model in models.items()
    }
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{role} {type(model).__name__}" for role, model in models.items())
        raise InputError(
            f"bench: both models must do the same, one of them predicts tokens and the other "
            f"doesn't, or takes other inputs: {named}; give the model that was pruned as --against"
        )
    for model in models.values():
        if any(name.endswith("_ids") for name in inputs_read(model)):
            decoded = settings.new_tokens if predicts_next_token(model) else 0
            check_seq_len(model, settings.prompt_length + decoded)


@contextmanager
def use_threads(number: int | None) -> Iterator[None]:
    """Give torch a number of threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
