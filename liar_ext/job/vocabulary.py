"""``--keep-vocab`` in a job: the tokens that stay, and the quality of smaller vocabularies.

Tokens differ between the vocabularies, so all of them read the same text, and language models are
compared by ``bits per byte``, ``−Σ log₂ p(token | tokens before) / bytes``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batches, read_batches
from liar_ext.calibration.documents import cut_pieces
from liar_ext.calibration.generated import SELF
from liar_ext.calibration.texts import evaluation_sequences, longest_read, unpacked
from liar_ext.checkpoint.folder import count_params
from liar_ext.job.planning import PROBE_KEEP, Sweep
from liar_ext.measure.embeddings import DenseEncoder, correlation
from liar_ext.measure.evaluation import perplexity
from liar_ext.measure.latency import light_copy
from liar_ext.models.recipe import Recipe
from liar_ext.models.running import (
    LOGITS,
    agree,
    check_alike,
    complete_inputs,
    device_of,
    evaluating,
    log_probabilities,
    output_of,
    predicts_next_token,
)
from liar_ext.report.report import Report
from liar_ext.report.tables import measured
from liar_ext.system.distributed import alone, broadcast, is_first
from liar_ext.system.errors import InputError
from liar_ext.vocabulary.keep import Choice, Counted, keep_tokens
from liar_ext.vocabulary.pieces import (
    STEP,
    pieces_of,
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
SHARED_HALVINGS = 2  # likewise in a budget that tokens share, around the best size
SAME_VOCABULARY = "The dense model's quality above was also measured with the smaller vocabulary."
SPLIT = 0.05  # more tokens per byte than before, from which on a warning says so
MORE = 0.02  # more than on the text that chose, likewise


def shares_budget(recipe: Recipe) -> bool:
    """Tell whether the size of the vocabulary is chosen in one budget with heads and channels."""
    # With fewer hidden features, experts or blocks, keep is of the smaller model.
    whole = recipe.keep_hidden == recipe.keep_experts == recipe.keep_blocks == 1.0
    return recipe.keep_vocab == "auto" and recipe.of == "params" and recipe.keep < 1 and whole


class SmallerVocabulary:
    """The tokens that a recipe keeps: ``model`` is changed in place, ``tokenizer`` is the new one.

    ``draw`` returns the calibration set of the old tokenizer, for a budget that tokens share.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: Any,
        read: Mapping[str, Sequence[str]],
        held_out: Sequence[str] | None,
        draw: Callable[[], Batches],
    ) -> None:
        self.model, self.tokenizer, self.facts, self.notes = model, tokenizer, {}, []
        self._draw, self.whole = draw, None
        how = {"seq_len": recipe.seq_len, "batch_size": recipe.batch_size}
        self._quality = partial(VocabularyQuality, model, tokenizer, **how)
        if recipe.keep_vocab == 1.0:
            return
        told = list(dict.fromkeys(recipe.vocab_text or recipe.calibration))
        if SELF in told:
            raise InputError(
                f"vocabulary: {SELF!r} can't choose tokens; name a text with --vocab-text"
            )
        chosen, facts = None, {}
        if is_first():
            texts = [text for source in told for text in read[source]]
            chosen, facts = self._choose(recipe, texts)
            if chosen and held_out:
                self.whole = self._quality(held_out, samples=recipe.eval_samples)
        chosen, facts = broadcast((chosen, facts))
        self.facts = {**facts, "text": told} if facts else {}
        if chosen is None:
            model.liar_vocabulary = None  # all tokens stay, which a job need not ask for
            if not facts:
                self.notes = [f"All tokens stay: --keep-vocab {recipe.keep_vocab:,} removes none."]
        else:
            self.tokenizer = keep_tokens(model, tokenizer, chosen)
        if self.whole is not None:
            self.facts["held_out"] = self.whole.compare(model, self.tokenizer)

    def _choose(self, recipe: Recipe, texts: Sequence[str]) -> tuple[Choice | None, dict[str, Any]]:
        """Return the choice of tokens, or None if all stay, and its facts."""
        count = partial(Counted, self.model, self.tokenizer, scripts=recipe.vocab_scripts)
        if recipe.keep_vocab != "auto":
            chosen = count(texts).choose(recipe.keep_vocab)
            return chosen, chosen.facts if chosen else {}
        texts, judging = held_out_of(texts)
        most = JUDGED_PIECES if predicts_next_token(self.model) else JUDGED_DOCUMENTS
        counted, quality = count(texts), self._quality(judging, samples=most)
        if quality.judged_by is None:
            raise InputError(
                f"vocabulary: {type(self.model).__name__} puts out logits of tokens, which don't "
                "compare between vocabularies; give a number of tokens instead of auto"
            )
        if shares_budget(recipe):
            with alone():
                chosen, auto = share_budget(counted, quality, recipe, self._draw())
        else:
            chosen, auto = smallest(counted, quality)
        whole = {"before": counted.size, "after": counted.size}
        whole |= {"kind": counted.pieces.kind_in_words, "kept_of_text": 1.0}
        facts = (chosen.facts if chosen else whole) | {"auto": auto}
        return chosen and replace(chosen, facts=facts), facts

    def add_to(self, report: Report, model: nn.Module) -> None:
        """Add the facts, and warnings by them, to the report of a pruned model."""
        report.warnings += self.notes
        if not self.facts:
            return
        facts = report.vocabulary = dict(self.facts)
        if facts["after"] == facts["before"]:
            report.warnings.append(
                "All tokens stay: with fewer the model loses too much on held-out text. Give more "
                "text with --vocab-text, or a number of tokens."
            )
            return
        held_out = found = facts.get("held_out", {})
        if self.whole is not None and report.plan.sites:
            found = self.whole.compare(model, self.tokenizer)
            facts["held_out"] = {**held_out, "pruned": found}
        if "pruned" in report.evaluation:  # encoders: from the model with all tokens
            report.evaluation["pruned"] = {**report.evaluation["pruned"], **measured(found)}
        if report.evaluation and ("certified" in report.evaluation or not measured(found)):
            report.warnings.append(SAME_VOCABULARY)
        report.warnings += split_warnings(facts["tokens_per_byte"], held_out)


def split_warnings(chosen: Sequence[float], held_out: Mapping[str, Any]) -> list[str]:
    """Warn of more tokens per byte, from those before and after, of the text that chose."""
    before, after = held_out.get("tokens_per_byte", chosen)
    more, of_chosen = after / before - 1, chosen[1] / chosen[0] - 1
    if more <= SPLIT and more <= of_chosen + MORE:
        return []
    kind = "text"
    if held_out:
        kind = f"held-out text, and {of_chosen:.0%} more for the text that chose it"
    return [
        f"The smaller vocabulary needs {more:.0%} more tokens for the {kind}. Name more text of "
        "that kind with --vocab-text, or keep more tokens."
    ]


def share_budget(
    counted: Counted, quality: VocabularyQuality, recipe: Recipe, batches: Batches
) -> tuple[Choice | None, dict[str, Any]]:
    """Return the vocabulary with which a model pruned to the whole budget loses least.

    Sizes fall by a quarter until the loss grows, heads and channels being pruned to the rest of the
    budget; then those halfway to both neighbours of the best are tried. None if all tokens stay.
    """
    model, tokenizer = counted.model, counted.tokenizer
    fixed = replace(recipe, schedule="one-pass", keep_vocab=1.0, vocab_text=(), vocab_scripts=())
    work = Sweep(model, batches, probe_keep=PROBE_KEEP)
    total, tried, choices = count_params(model), {}, {}

    def measure(size: int) -> None:
        choice = counted.choose(size)
        smaller = smaller_copy(model, tokenizer, choice)
        keep = recipe.keep + 1 - count_params(smaller[0]) / total
        if keep < 1:
            pruned, _ = work.prune(replace(fixed, keep=keep))
            smaller = smaller_copy(pruned, tokenizer, choice)
        found = quality.compare(*smaller)
        tried[size] = [size, quality.loss(found), found["tokens_per_byte"][1], min(keep, 1.0)]
        choices[size] = choice and replace(choice, facts=choice.facts | {"held_out": found})

    def best() -> int:
        return min(tried, key=lambda size: (tried[size][1], size))

    refused = None
    for size in sizes_of(counted.size):
        try:
            measure(size)
        except InputError as error:  # sites can't go down so far, or more tokens must stay
            refused = refused or error
        if tried and best() != min(tried):
            break
    if not tried:
        raise refused
    for _ in range(SHARED_HALVINGS):
        sizes, middle = sorted(tried), best()
        at = sizes.index(middle)
        around = sizes[max(at - 1, 0) : at] + sizes[at + 1 : at + 2]
        halfway = {STEP * round((middle + each) / 2 / STEP) for each in around}
        for size in sorted(halfway - tried.keys()):
            measure(size)
    curve = [tried[size] for size in sorted(tried)]
    return choices[best()], {"curve": curve, "judged_by": quality.judged_by, "most_loss": None}


def smallest(counted: Counted, quality: VocabularyQuality) -> tuple[Choice | None, dict[str, Any]]:
    """Return the smallest vocabulary whose loss is in bounds, or None, and the curve of sizes.

    Sizes fall by a quarter until one loses too much; the last step is halved three times. The curve
    has ``[tokens, loss, tokens per byte]``.
    """
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
        if loss <= most:  # sizes that are tried are below all good ones before
            best = replace(choice, facts=choice.facts | {"held_out": found})
        return loss <= most

    good, *smaller = sizes_of(counted.size)
    bad = good
    for bad in smaller:
        if not is_good(bad):
            break
        good = bad
    for _ in range(HALVINGS):
        middle = STEP * round((good + bad) / 2 / STEP)
        if not bad < middle < good:
            break
        good, bad = (middle, bad) if is_good(middle) else (good, middle)
    steps = [curve[size] for size in sorted(curve)]
    return best, {"curve": steps, "judged_by": quality.judged_by, "most_loss": most}


def sizes_of(size: int) -> list[int]:
    """Return sizes from all tokens on, each about three quarters of the one before."""
    found = [size]
    # Rounding to multiples of 64 ends it: three quarters of 128 are 128 again.
    while (smaller := size_of(int(found[-1] * SMALLER), size)) < found[-1]:
        found.append(smaller)
    return found


def smaller_copy(model: nn.Module, tokenizer: Any, choice: Choice | None) -> tuple[nn.Module, Any]:
    """Return model and tokenizer with fewer tokens and the same other weights."""
    if choice is None:
        return model, tokenizer
    copied = light_copy(model)
    return copied, keep_tokens(copied, tokenizer, choice)


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


class VocabularyQuality:
    """Quality of a model with all its tokens on text that chose none, to compare fewer with.

    The model is run now, on at most ``samples`` documents, or pieces of them for a language model.
    ``judged_by`` is the measure by which sizes are judged; None if none is comparable.
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
        self.read = self.texts if self.causal else unpacked(texts, seq_len, samples)
        self.rate = tokens_per_byte(backend, self.read)
        self.judged_by, self.logits = "bits_per_byte", None
        if self.causal:
            self.bits = self._bits_per_byte(model, tokenizer)
            return
        batches = self._batches(tokenizer)
        self.name, self.logits = _logits(model, batches)
        if self.logits is None:
            self.judged_by, self.dense = "cosine", DenseEncoder(model, batches)
        elif self.logits.dim() != 2:
            self.judged_by = None
        else:
            self.judged_by = "correlation" if self.name == "scores" else "agreement"

    def compare(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """Return tokens per byte, and bits per byte (each with all tokens first) or likeness."""
        rate = tokens_per_byte(plain(json.dumps(spec_of(tokenizer))), self.read)
        found: dict[str, Any] = {"tokens_per_byte": [self.rate, rate]}
        if self.causal:
            return found | {"bits_per_byte": [self.bits, self._bits_per_byte(model, tokenizer)]}
        batches = self._batches(tokenizer)
        if self.logits is None:
            likeness = self.dense.compare(model, batches)
            return found | {n: likeness[n] for n in ("cosine", "neighbours") if n in likeness}
        if self.judged_by is None:
            return found
        name, own = _logits(model, batches)
        check_alike(model, (name, getattr(own, "shape", ())), (self.name, self.logits.shape))
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
