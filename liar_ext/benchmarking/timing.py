"""Time models that are loaded, in turns.

The order changes from round to round, so that what else the machine does falls on both; a ratio is
taken within a round, and its quartiles say how steady it was.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.bars import Bar
from liar_ext.benchmarking.stored import Quartiles, Rate
from liar_ext.data.texts import check_seq_len
from liar_ext.errors import InputError
from liar_ext.models.inputs import draw_inputs, inputs_read
from liar_ext.models.running import device_of, predicts_next_token

SEED = 0
Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """How a benchmark is made.

    Parameters
    ----------
    rounds : int
        Rounds that are timed, after one that is not.
    prompt_length, new_tokens : int
        Tokens of a prompt, or of a sentence, and tokens that are decoded after it.
    batches : tuple of int
        Batch sizes, each of which is measured.
    dtype, device : str
        Of the weights, and where.
    threads : int or None
        Of torch on the CPU; None leaves them as they are.
    """

    rounds: int = 5
    prompt_length: int = 128
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 32)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None


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
            order = list(models) if turn % 2 else list(models)[::-1]
            for role in order:
                for key, value in run_once(models[role], batch, settings, clock).items():
                    if turn:
                        values.setdefault(key, {}).setdefault(role, []).append(value)
            bar.update()
        for (what, unit), by_role in values.items():
            found.append(_rate(batch, what, unit, by_role))
    bar.close()
    return found


def _rate(batch: int, what: str, unit: str, by_role: Mapping[str, Sequence[float]]) -> Rate:
    pruned, dense = by_role["pruned"], by_role.get("dense")
    if dense is None:
        return Rate(batch, what, unit, Quartiles.of(pruned))
    ratios = [ours / theirs for ours, theirs in zip(pruned, dense, strict=True)]
    return Rate(batch, what, unit, *map(Quartiles.of, (pruned, dense, ratios)))


@torch.no_grad()
def run_once(
    model: nn.Module, batch: int, settings: Settings, clock: Clock
) -> dict[tuple[str, str], float]:
    """Run a model once; return what was found by name and unit."""
    inputs = inputs_of(model, batch, settings)
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


def inputs_of(model: nn.Module, batch: int, settings: Settings) -> dict[str, Tensor]:
    """Return random inputs, the same for every model of a kind."""
    generator = torch.Generator().manual_seed(SEED)
    device, config = device_of(model), model.config.get_text_config()
    # Not the last tokens, which multimodal models keep for images.
    vocabulary = max(1, getattr(config, "vocab_size", 0) // 2)
    drawn = draw_inputs(model, batch, settings.prompt_length, generator, vocabulary)
    inputs = {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in drawn.items()
    }
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def now(model: nn.Module, clock: Clock) -> float:
    """Return the time when all that was asked of the model's device is done."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type in ("mps", "xpu"):
        getattr(torch, device.type).synchronize()
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
