"""A pruned causal language model: perplexity, speed, and how the same text goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from statistics import median

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar_ext import perplexity
from liar_ext.calibration.texts import evaluation_sequences

WINDOWS, WINDOW = 6, 512
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 48, 40
PREFILL_ROUNDS = 3
PHRASE = 3  # tokens


def compare(models: Mapping[str, nn.Module], tokenizer, articles: Sequence[str]) -> dict:
    """Return perplexity, tokens per second and continuations, by model.

    Parameters
    ----------
    models : mapping of str to nn.Module
        The dense model first.
    tokenizer
        Of all models.
    articles : sequence of str
        Held-out text.
    """
    held_out = evaluation_sequences(articles, tokenizer, seq_len=WINDOW, samples=WINDOWS)
    results: dict[str, dict] = {}
    for name, model in models.items():
        print(f"perplexity, {name}:", flush=True)
        parameters = sum(each.numel() for each in model.parameters())
        measured = perplexity(model, held_out.batches(), progress=True)
        results[name] = {"parameters": parameters, **measured}
    prefill = prefill_speed(models, held_out.input_ids[:1])
    prompts = openings(articles, tokenizer)
    written, decode = continuations(models, prompts)
    dense = next(iter(written.values()))
    for name, result in results.items():
        pairs = zip(dense, written[name], strict=True)
        result |= {
            "prefill_tokens_per_second": prefill[name],
            "decode_tokens_per_second": decode[name],
            "new_tokens": NEW_TOKENS,
            "equal_tokens": [equal_at_start(theirs, ours) for theirs, ours in pairs],
            "repeated": repeated(written[name]),
            "continuations": [one_line(tokenizer, ids) for ids in written[name]],
        }
    return {"models": results, "prompts": [one_line(tokenizer, ids) for ids in prompts]}


def openings(articles: Sequence[str], tokenizer) -> list[list[int]]:
    """Return the first tokens of articles, evenly spread over those that are long enough."""
    encoded = tokenizer(list(articles), add_special_tokens=False, verbose=False)["input_ids"]
    long = [ids for ids in encoded if len(ids) >= PROMPT_TOKENS + NEW_TOKENS]
    places = [(2 * i + 1) * len(long) // (2 * PROMPTS) for i in range(PROMPTS)]
    return [long[place][:PROMPT_TOKENS] for place in places]


def greedy(model: nn.Module, ids: Sequence[int], most: int) -> list[int]:
    """Return the likeliest next tokens, one after the other, up to ``most`` or the text's end."""
    prompt = torch.tensor([list(ids)])
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=most,
        pad_token_id=0,
    )
    return tokens[0, len(ids) :].tolist()


def continuations(
    models: Mapping[str, nn.Module], prompts: Sequence[Sequence[int]]
) -> tuple[dict[str, list[list[int]]], dict[str, float]]:
    """Return what each model writes after each prompt, and its median tokens per second.

    The first token comes out of the prompt's pass, whose time is taken off.
    """
    written: dict[str, list[list[int]]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for ids in tqdm(prompts, desc="greedy decoding"):
        for name, model in models.items():
            start = time.perf_counter()
            greedy(model, ids, 1)
            after_prompt = time.perf_counter()
            tokens = greedy(model, ids, NEW_TOKENS)
            taken = time.perf_counter() - after_prompt - (after_prompt - start)
            written[name].append(tokens)
            if len(tokens) > 1:
                seconds[name].append(taken / (len(tokens) - 1))
    nothing = [math.inf]  # all texts ended at once
    return written, {name: 1 / median(taken or nothing) for name, taken in seconds.items()}


@torch.no_grad()
def prefill_speed(models: Mapping[str, nn.Module], ids: Tensor) -> dict[str, float]:
    """Return the median tokens per second of a prompt, ``(1, tokens)``; the models take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in tqdm(range(PREFILL_ROUNDS + 1), desc="prefill"):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: ids.numel() / median(taken) for name, taken in seconds.items()}


def equal_at_start(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two continuations share up to the first difference."""
    return len(commonprefix([left, right]))


def repeated(continuations: Sequence[Sequence[int]]) -> float:
    """Return the fraction of phrases of three tokens that the same continuation had before."""
    again = total = 0
    for ids in continuations:
        phrases = [tuple(ids[at : at + PHRASE]) for at in range(len(ids) - PHRASE + 1)]
        again += len(phrases) - len(set(phrases))
        total += len(phrases)
    return again / max(total, 1)


def one_line(tokenizer, ids: Sequence[int]) -> str:
    """Return tokens as text on one line, up to the token that ends a text."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
