"""What a smaller vocabulary costs in quality on held-out text, and the smallest one at a loss.

Tokens differ between the vocabularies, so all of them read the same text, and language models are
compared by ``bits per byte``, ``−Σ log₂ p(token | tokens before) / bytes``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.folds import cut_pieces
from liar_ext.calibration.texts import evaluation_sequences, longest_read, unpacked
from liar_ext.measure.embeddings import DenseEncoder, correlation
from liar_ext.measure.evaluation import perplexity
from liar_ext.measure.latency import light_copy
from liar_ext.models.outputs import (
    LOGITS,
    agree,
    check_alike,
    log_probabilities,
    output_of,
)
from liar_ext.models.running import (
    complete_inputs,
    device_of,
    evaluating,
    predicts_next_token,
)
from liar_ext.system.errors import InputError
from liar_ext.vocabulary.keep import (
    STEP,
    Choice,
    Counted,
    keep_tokens,
    plain,
    size_in_bytes,
    size_of,
    spec_of,
    tokens_per_byte,
)

# Measures by which ``auto`` takes a size, and the loss at which it stops: a fraction.
LOSSES = {"bits_per_byte": 0.01, "cosine": 0.005, "agreement": 0.005, "correlation": 0.005}
PIECE = 256  # tokens, at most, of a piece of text that a language model reads
HELD_OUT, LEAST_DOCUMENTS = 5, 20  # every fifth document; with fewer, pieces of them
CHARACTERS = 2000  # of such a piece
JUDGED_PIECES, JUDGED_DOCUMENTS = 64, 256  # at most, of language models and encoders
SMALLER, HALVINGS = 0.75, 3  # the steps of sizes, and how often the last one is halved


class VocabularyQuality:
    """Quality of a model with all its tokens on text that chose none, to compare fewer with.

    The model is run now, on at most ``samples`` documents, or pieces of them if it is a language
    model, of at most ``seq_len`` tokens, ``batch_size`` at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        seq_len: int,
        batch_size: int,
        samples: int | None = None,
    ) -> None:
        self.texts, self.batch_size = texts, batch_size
        self.seq_len = seq_len = longest_read(tokenizer, seq_len)
        self.samples, self.causal = samples, predicts_next_token(model)
        backend = plain(json.dumps(spec_of(tokenizer)))
        if self.causal:
            length = min(seq_len // 2, PIECE) or 1
            self.texts, self.samples = pieces_of(backend, texts, length, samples), None
        read = self.texts if self.causal else unpacked(texts, seq_len, samples)
        self.read, self.rate = read, tokens_per_byte(backend, read)
        if self.causal:
            self.bits = self._bits_per_byte(model, tokenizer)
            return
        batches = self._batches(tokenizer)
        self.name, self.logits = _logits(model, batches)
        self.dense = DenseEncoder(model, batches) if self.logits is None else None

    @property
    def judged_by(self) -> str | None:
        """The measure by which sizes are judged; None if none is comparable."""
        if self.causal or self.logits is None:
            return "bits_per_byte" if self.causal else "cosine"
        if self.logits.dim() != 2:
            return None
        return "correlation" if self.name == "scores" else "agreement"

    def check_judges(self, model: nn.Module) -> None:
        """Raise InputError if no measure compares the model's outputs between vocabularies."""
        if self.judged_by is None:
            raise InputError(
                f"vocabulary: {type(model).__name__} puts out logits of tokens, which don't "
                "compare between vocabularies; give a number of tokens instead of auto"
            )

    def compare(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """Return tokens per byte, and bits per byte (each with all tokens first) or likeness."""
        rate = tokens_per_byte(plain(json.dumps(spec_of(tokenizer))), self.read)
        found: dict[str, Any] = {"tokens_per_byte": [self.rate, rate]}
        if self.causal:
            return found | {"bits_per_byte": [self.bits, self._bits_per_byte(model, tokenizer)]}
        batches = self._batches(tokenizer)
        if self.dense is not None:
            likeness = self.dense.compare(model, batches)
            return found | {n: likeness[n] for n in ("cosine", "neighbours") if n in likeness}
        if self.judged_by is None:
            return found
        name, own = _logits(model, batches)
        shape = () if own is None else own.shape
        check_alike(model, (name, shape), (self.name, self.logits.shape))
        if self.judged_by == "correlation":
            return found | {"correlation": correlation(self.logits, own)}
        p, q = (log_probabilities(self.name, each) for each in (self.logits, own))
        same = agree(self.name, p, own).double().mean()
        divergence = (p.exp() * (p - q)).sum(-1).mean()
        return found | {"divergence": max(float(divergence), 0.0), "agreement": float(same)}

    def loss(self, found: dict[str, Any]) -> float:
        """Return the loss by the measure that judges, as a fraction; infinity if unmeasured."""
        value = found.get(self.judged_by)
        if value is None:
            return math.inf
        lost = value[1] / value[0] - 1 if self.causal else 1 - value
        return lost if math.isfinite(lost) else math.inf

    def _bits_per_byte(self, model: nn.Module, tokenizer: Any) -> float:
        """Return the bits of all pieces by their bytes; infinity if one is too long to be read."""
        batches = self._batches(tokenizer)
        if any(batch["attention_mask"].sum(1).max() >= self.seq_len for batch in batches):
            return math.inf
        found = perplexity(model, batches)
        return math.log2(found["perplexity"]) * found["tokens"] / size_in_bytes(self.texts)

    def _batches(self, tokenizer: Any) -> list[dict[str, Tensor]]:
        """Return the sequences of the texts in their order, whatever their lengths are now."""
        how = {"seq_len": self.seq_len, "samples": self.samples, "packed": False}
        found = evaluation_sequences(self.texts, tokenizer, **how)
        rows = torch.arange(len(found)).split(self.batch_size)
        return [{n: each[some] for n, each in found.inputs.items()} for some in rows]


def pieces_of(backend: Any, texts: Sequence[str], length: int, most: int | None) -> list[str]:
    """Return consecutive pieces of texts, of ``length`` tokens each; every n-th if too many."""
    found = []
    for text in texts:
        spans = backend.encode(text, add_special_tokens=False).offsets
        starts = [start for start, _ in spans[::length]]
        ends = [*starts[1:], len(text)]
        found += [text[start:end] for start, end in zip(starts, ends, strict=False)]
    found = [each for each in found if each.strip()]
    return found if most is None else found[:: len(found) // most or 1][:most]


def held_out_of(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the text that chooses tokens, and every fifth document, which chooses none."""
    texts = list(texts)
    if len(texts) < LEAST_DOCUMENTS:
        texts = [piece for text in texts for piece in cut_pieces(text, CHARACTERS)]
    if len(texts) < LEAST_DOCUMENTS:
        raise InputError(
            f"vocabulary: auto holds out a fifth of the text, of which it needs {LEAST_DOCUMENTS} "
            f"documents or pieces of {CHARACTERS:,} characters, got {len(texts)}; give more text "
            "with --vocab-text, or a number of tokens"
        )
    return [text for at, text in enumerate(texts) if at % HELD_OUT], texts[::HELD_OUT]


def smallest(counted: Counted, quality: VocabularyQuality) -> tuple[Choice | None, dict[str, Any]]:
    """Return the smallest vocabulary whose measured loss is in bounds, and the curve of sizes.

    Sizes fall by a quarter until one loses too much; the last step is halved three times. None if
    each smaller vocabulary loses too much. The curve has ``[tokens, loss, tokens per byte]``.
    """
    quality.check_judges(counted.model)
    most = LOSSES[quality.judged_by]
    curve: dict[int, list[float]] = {}
    best: Choice | None = None

    def is_good(size: int) -> bool:
        nonlocal best
        try:
            choice = counted.choose(size)
        except InputError:  # more tokens must stay
            return False
        found = quality.compare(*smaller_copy(counted.model, counted.tokenizer, choice))
        loss = quality.loss(found)
        curve[size] = [size, loss, found["tokens_per_byte"][1]]
        if loss <= most and (best is None or size < len(best.order)):
            best = replace(choice, facts=choice.facts | {"held_out": found})
        return loss <= most

    _search(is_good, counted.size)
    steps = [curve[size] for size in sorted(curve)]
    return best, {"curve": steps, "judged_by": quality.judged_by, "most_loss": most}


def _search(is_good: Callable[[int], bool], size: int) -> None:
    """Try smaller sizes, each of which is a multiple of 64, until one isn't good; then between."""
    good = size
    while (bad := size_of(int(good * SMALLER), size)) < good and is_good(bad):
        good = bad
    for _ in range(HALVINGS):
        middle = STEP * round((good + bad) / 2 / STEP)
        if not bad < middle < good:
            return
        good, bad = (middle, bad) if is_good(middle) else (good, middle)


def smaller_copy(model: nn.Module, tokenizer: Any, choice: Choice | None) -> tuple[nn.Module, Any]:
    """Return model and tokenizer with fewer tokens, or both if all stay.

    All other weights are those of the model.
    """
    if choice is None:
        return model, tokenizer
    copied = light_copy(model)
    return copied, keep_tokens(copied, tokenizer, choice)


@torch.no_grad()
def _logits(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[str, Tensor | None]:
    """Return name and logits of all sequences; those of one batch if it has some for each token."""
    found, device = [], device_of(model)
    with evaluating(model):
        for batch in read_batches(batches):
            inputs = complete_inputs(model, batch.to(device).inputs, batch.labels)
            name, value = output_of(model, model(**inputs))
            if name not in LOGITS:
                return name, None
            if value.dim() != 2:
                return name, value
            found.append(value.float().cpu())
    return name, torch.cat(found)
