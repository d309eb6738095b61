"""Word error rate of a model that writes down what it hears."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import nn

from liar_ext.calibration.media import WRITTEN, Clip, Item, Reader
from liar_ext.errors import InputError
from liar_ext.progress import Bar


def word_errors(
    model: nn.Module,
    reader: Reader,
    items: Sequence[Item],
    *,
    batch_size: int = WRITTEN,
    progress: bool = False,
) -> dict[str, float]:
    """Return the word error rate ``(substituted + left out + added words) / words``.

    Case, punctuation, and in English spellings and numbers, are made alike first, as Whisper's
    authors do. Recordings longer than the model hears are cut, and their pieces joined. The model,
    in evaluation mode, writes as its generation config says, greedily by default. ``reader`` makes
    its inputs, see :func:`liar_ext.checkpoint.loading.load_reader`; ``items`` are recordings
    with what is said in them, of which ``batch_size`` pieces are written down at a time.

    Returns ``word_error_rate``; ``words`` of the transcripts; ``recordings``; ``minutes`` of audio;
    ``seconds_per_minute``: time to write down a minute of it, features included. InputError if the
    model writes nothing, or nobody knows what is said in a recording.
    """
    try:
        from jiwer import process_words
    except ImportError:
        raise InputError(
            "eval: word error rates are counted by the package jiwer; "
            "pip install 'liar_ext[speech]'"
        ) from None
    silent = [item.place for item in items if not item.text]
    if silent or not reader.writes or not items:
        what = f"{silent[0]} has none beside it" if silent else f"got {type(model).__name__}"
        raise InputError(
            "eval: word error rates need a model that writes, and what is said in each recording "
            f"as NAME.txt beside NAME.wav; {what}"
        )
    clips: list[tuple[int, Clip]] = []  # pieces with the number of their recording
    for number, item in enumerate(items):
        clips += [(number, clip) for clip in reader.clips([item])]
    heard = ["" for _ in items]
    start = time.perf_counter()
    writer = reader.of(model)
    for at in Bar(range(0, len(clips), batch_size), desc="evaluate", disable=not progress):
        numbers, some = zip(*clips[at : at + batch_size], strict=True)
        features = writer.features([samples for samples, _ in some])
        said = writer.write_down(next(iter(features.values())))
        for number, text in zip(numbers, said, strict=True):
            heard[number] += f" {text}"
    seconds = time.perf_counter() - start
    alike = _alike(model)
    said = [alike(item.text) for item in items]
    found = process_words(said, [alike(text) for text in heard])
    minutes = sum(len(clip[0]) for _, clip in clips) / reader.processor.sampling_rate / 60
    return {
        "word_error_rate": found.wer,
        "words": sum(len(text.split()) for text in said),
        "recordings": len(items),
        "minutes": minutes,
        "seconds_per_minute": seconds / minutes,
    }


def _alike(model: nn.Module) -> Callable[[str], str]:
    """Return what makes texts comparable: English by its own rules, other languages by case."""
    from transformers.models.whisper.english_normalizer import (
        BasicTextNormalizer,
        EnglishTextNormalizer,
    )

    said = getattr(model, "generation_config", None)
    many = getattr(said, "is_multilingual", True) and getattr(said, "language", None) != "en"
    return BasicTextNormalizer() if many else EnglishTextNormalizer({})
