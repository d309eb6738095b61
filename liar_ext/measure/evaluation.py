"""The quality of what a model writes: perplexity, divergence, tasks of lm-eval, word errors."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liar_ext.calibration.batches import Batches, read_batches
from liar_ext.calibration.divergence import DenseOutputs
from liar_ext.calibration.media import WRITTEN, Item, Reader, language_of
from liar_ext.models.running import complete_inputs, device_of, evaluating, predicts_next_token
from liar_ext.system.errors import InputError, did_you_mean, install, refusing
from liar_ext.system.progress import Bar, shows_bars

MOST_EXPONENT = 709  # of exp in float64


@torch.no_grad()
def perplexity(model: nn.Module, batches: Batches, *, progress: bool = False) -> dict[str, float]:
    """Return the perplexity ``exp(−(1/N) Σ log p(token | tokens before it in its window))``.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    batches : iterable of mapping or Tensor
        ``input_ids`` and ``attention_mask``, ``(batch, seq_len)`` each, and the images of a model
        that reads them; without a mask every token counts. Padding is neither predicted nor
        predicted from, and placeholders of images are not predicted.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        ``perplexity``; ``tokens`` predicted (the first of each window is not); ``sequences``;
        ``seq_len``. Perplexities at different ``seq_len`` do not compare.

    Raises
    ------
    InputError
        If the model doesn't predict each token from those before it, gives no token logits, or
        there is nothing to predict.
    """
    if not predicts_next_token(model):
        raise InputError(
            "perplexity: needs a causal language model, got "
            f"{type(model).__name__}, which sees the tokens that it is to predict, or predicts none"
        )
    device = device_of(model)
    placeholder = getattr(model.config, "image_token_id", None)
    placeholder = -1 if placeholder is None else placeholder
    loss, tokens, sequences, seq_len = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in read_batches(Bar(batches, desc="evaluate", shown=progress)):
            batch = batch.to(device)
            if "input_ids" not in batch.inputs:
                raise InputError("perplexity: each batch needs input_ids, the tokens to predict")
            ids = batch.inputs["input_ids"]
            mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask
            inputs = complete_inputs(model, batch.inputs)
            if inputs.get("attention_mask", ids).dim() == 2:  # else it says who sees whom
                inputs["attention_mask"] = mask.to(ids.dtype)
            output = model(**inputs, use_cache=False)
            if getattr(output, "logits", None) is None or output.logits.shape[:2] != ids.shape:
                raise InputError("perplexity: needs a causal language model with token logits")
            text = ids != placeholder
            for logits, target, real, is_text in zip(output.logits, ids, mask, text, strict=True):
                chosen = (real[:-1] & real[1:]) & is_text[1:]
                said, wanted = logits[:-1][chosen].float(), target[1:][chosen]
                loss += float(nn.functional.cross_entropy(said, wanted, reduction="sum"))
                tokens += int(chosen.sum())
            sequences += len(ids)
            seq_len = max(seq_len, ids.shape[1])
    if not tokens:
        raise InputError("perplexity: no token to predict; give more text")
    mean = loss / tokens
    return {
        "perplexity": math.inf if mean > MOST_EXPONENT else math.exp(mean),
        "tokens": tokens,
        "sequences": sequences,
        "seq_len": seq_len,
    }


@torch.no_grad()
def kl_divergence(
    model: nn.Module, dense: nn.Module, batches: Batches, *, progress: bool = False
) -> float:
    """Return ``(1/N) Σ KL(p ‖ q)`` in nats: p the dense model's predictions, q those of ``model``.

    It says how much of the dense model's behaviour is lost, whatever the text, where perplexity
    says how well a text is predicted. Models without logits are compared by their last hidden
    state; see :class:`liar_ext.calibration.divergence.DenseOutputs`.

    Parameters
    ----------
    model, dense : nn.Module
        Models with the same outputs.
    batches : iterable of mapping
        Inputs of the models, such as ``input_ids`` and ``attention_mask``.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InputError
        If there is no batch.
    """
    total, rows = 0.0, 0
    with evaluating(model), evaluating(dense):
        for batch in read_batches(Bar(batches, desc="divergence", shown=progress)):
            compared = DenseOutputs(dense, batch)
            total, rows = total + compared.divergence(model), rows + len(compared)
    if not rows:
        raise InputError("kl_divergence: needs at least one batch, got none; give more text")
    return total / rows


def load_tasks(names: Sequence[str], include_path: str | None = None) -> list[Any]:
    """Return tasks of lm-eval by name, with their data.

    Parameters
    ----------
    names : sequence of str
        Tasks, groups or tags.
    include_path : str, optional
        Folder of task files (YAML) of one's own, which come before lm-eval's.

    Raises
    ------
    InputError
        If lm-eval isn't installed, there is no such task, or its data can't be read.
    """
    lm_eval = _import()
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"eval: --include-path must be a folder of task files, got {include_path}")
    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks, "lm-eval ls tasks lists them", 3)
            raise InputError(f"eval: lm-eval knows no task {name!r}; {hint}")
    hint = "its data must be at hand, in the cache of datasets or in files that the task names"
    # Of datasets, YAML and a task's own code: whatever a file holds.
    with refusing("eval: a task can't be loaded", hint, Exception, named=True):
        loaded = manager.load(list(names))
    return [*loaded["groups"].values(), *loaded["tasks"].values()]


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Return what lm-eval measures on tasks.

    Parameters
    ----------
    model : nn.Module
        A causal language model, where it is.
    tokenizer
        Its tokenizer.
    tasks : sequence
        From :func:`load_tasks`.
    limit : int, optional
        Items per task; all by default.
    num_fewshot : int, optional
        Examples in each prompt; what the task says by default.
    batch_size : int
        Requests per forward pass.

    Returns
    -------
    dict
        ``tasks``: metrics and standard errors by task; ``items``: how many of each were run;
        ``table``: all of it as lm-eval prints it; ``lm_eval``: its version.
    """
    lm_eval = _import()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    with evaluating(model), _talking():
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            # It looks for nothing; the default reads all of lm-eval's task files.
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        )
    table = make_table(results)
    if results.get("groups"):
        table = f"{table}\n{make_table(results, 'groups')}"
    measured = {name: _numbers(metrics) for name, metrics in results["results"].items()}
    items = {name: count["effective"] for name, count in results["n-samples"].items()}
    return {"tasks": measured, "items": items, "table": table, "lm_eval": version("lm_eval")}


def _import() -> Any:
    with refusing("eval: tasks need lm-eval", install("eval"), Exception):
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    return lm_eval


@contextmanager
def _talking() -> Iterator[None]:
    """Show lm-eval's bars and messages where ours are shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with nullcontext() if shows_bars() else redirect_stderr(io.StringIO()):
        logger.setLevel(level if shows_bars() else logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics without lm-eval's notes, and its ``,none`` for no filter."""
    return {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if isinstance(value, int | float) and name not in ("sample_len", "sample_count")
    }


def word_errors(
    model: nn.Module,
    reader: Reader,
    items: Sequence[Item],
    *,
    batch_size: int = WRITTEN,
) -> dict[str, float]:
    """Return the word error rate ``(substituted + left out + added words) / words``.

    Case, punctuation, and in English spellings and numbers, are made alike first, as Whisper's
    authors do. Recordings longer than the model hears are cut, and their pieces joined. The model,
    in evaluation mode, writes as its generation config says, greedily by default. ``reader`` makes
    its inputs, see :func:`liar_ext.checkpoint.readers.load_reader`; ``items`` are recordings
    with what is said in them, of which ``batch_size`` pieces are written down at a time.

    Returns ``word_error_rate``; ``words`` of the transcripts; ``recordings``; ``minutes`` of audio;
    ``seconds_per_minute``: time to write down a minute of it, features included.
    """
    what = "eval: word error rates are counted by the package jiwer"
    with refusing(what, "pip install jiwer", Exception):
        from jiwer import process_words
    if not reader.writes or not items or not all(item.text for item in items):
        raise InputError(
            "eval: word error rates need a model that writes, and what is said in each recording "
            "as NAME.txt beside NAME.wav"
        )
    # Pieces with the number of their recording.
    clips = [(at, clip) for at, item in enumerate(items) for clip in reader.clips([item])]
    heard = ["" for _ in items]
    start = time.perf_counter()
    writer = Reader(reader.kind, model, reader.processor, reader.tokenizer)
    for at in Bar(range(0, len(clips), batch_size), desc="evaluate"):
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

    how = getattr(model, "generation_config", None)
    many = getattr(how, "is_multilingual", True) and language_of(model) != "en"
    return BasicTextNormalizer() if many else EnglishTextNormalizer({})
