"""A sentence encoder with half of its heads, channels and tokens: retrieval and speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

BATCH, LONGEST = 32, 128
SENTENCES, ROUNDS = 256, 3


def compare(models: Mapping[str, tuple[nn.Module, Any]], articles: Sequence[str]) -> dict:
    """Return recall@1 from title to body, and sentences per second, by model.

    Parameters
    ----------
    models : mapping of str to (nn.Module, tokenizer)
        The dense model first.
    articles : sequence of str
        Held-out articles, no two with one title or body.
    """
    parts = (each.strip().partition("\n") for each in articles)
    titles, bodies = zip(*((title.strip(), body.strip()) for title, _, body in parts), strict=True)
    found = {
        name: nearest_is_own(
            embed(*model, titles, f"embed titles, {name}"),
            embed(*model, bodies, f"embed bodies, {name}"),
        )
        for name, model in models.items()
    }
    speeds = sentences_per_second(models, some_sentences(bodies, SENTENCES))
    dense = next(iter(found.values()))
    return {
        name: {
            "parameters": sum(each.numel() for each in model.parameters()),
            "articles": len(titles),
            "recall_at_1": float(found[name].double().mean()),
            "found_by_dense_only": int((dense & ~found[name]).sum()),
            "found_by_this_only": int((~dense & found[name]).sum()),
            "sentences_per_second": speeds[name],
        }
        for name, (model, _) in models.items()
    }


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], title: str = "") -> Tensor:
    """Return the embedding of each text, ``h / |h|`` of ``h``, the mean of its tokens' outputs.

    Texts are cut after ``LONGEST`` tokens; those of like length share a batch. A progress bar is
    shown if it has a title.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: dict[int, Tensor] = {}
    for at in tqdm(range(0, len(order), BATCH), desc=title, disable=not title):
        here = order[at : at + BATCH]
        inputs = tokenizer(
            [texts[i] for i in here],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        mask = inputs["attention_mask"][..., None]
        mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        rows |= zip(here, nn.functional.normalize(mean, dim=-1), strict=True)
    return torch.stack([rows[i] for i in range(len(texts))])


def nearest_is_own(queries: Tensor, documents: Tensor) -> Tensor:
    """Return for each query whether the document of its row is the nearest; recall@1 is the mean.

    Both are ``(n, features)`` and of length 1, so that the product is the cosine.
    """
    return (queries @ documents.T).argmax(1) == torch.arange(len(queries))


def sentences_per_second(
    models: Mapping[str, tuple[nn.Module, Any]], sentences: Sequence[str]
) -> dict[str, float]:
    """Return the median speed by model; the models take turns, after a round that isn't timed."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in tqdm(range(ROUNDS + 1), desc="sentences per second"):
        for name, model in models.items():
            start = time.perf_counter()
            embed(*model, sentences)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: len(sentences) / median(taken) for name, taken in seconds.items()}


def some_sentences(bodies: Sequence[str], count: int) -> list[str]:
    """Return sentences of the bodies, evenly spread: what stands between full stops."""
    every = [part.strip() for body in bodies for part in body.replace("\n", " ").split(". ")]
    every = [sentence for sentence in every if len(sentence.split()) > 4]
    return every[:: max(1, len(every) // count)][:count]
