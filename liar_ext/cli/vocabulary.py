"""``--keep-vocab``: the model and its tokenizer with fewer tokens, before any text is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from liar_ext.calibration.generated import SELF
from liar_ext.calibration.texts import evaluation_sequences
from liar_ext.distributed import broadcast, is_first
from liar_ext.errors import InputError
from liar_ext.measure.embeddings import DenseEncoder
from liar_ext.measure.evaluation import perplexity
from liar_ext.models.running import predicts_next_token
from liar_ext.recipe import Recipe
from liar_ext.report.report import Report
from liar_ext.vocabulary.choosing import plain
from liar_ext.vocabulary.keep import Choice, choose_tokens, keep_tokens, tokens_per_byte

SPLIT = 1.05  # times as many tokens per byte as before, from which on a warning says so


class SmallerVocabulary:
    """What a recipe leaves of the vocabulary, and how much that changes.

    The model is changed in place; ``tokenizer`` is the new one. Everything is as before if the
    recipe keeps all tokens.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: Any,
        read: Mapping[str, Sequence[str]],
        held_out: Sequence[str] | None,
    ) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, {}
        self.whole: _Quality | None = None
        if recipe.keep_vocab == 1.0:
            return
        if SELF in recipe.vocab_text or (SELF in recipe.calibration and not recipe.vocab_text):
            raise InputError(
                "vocabulary: text that the model generates can't decide which tokens stay; name a "
                "text with --vocab-text"
            )
        chosen, told = None, recipe.vocab_text or recipe.calibration
        if is_first():
            texts = [text for source in dict.fromkeys(told) for text in read[source]]
            chosen = choose_tokens(model, tokenizer, texts, recipe.keep_vocab)
            if chosen and held_out:
                self.whole = _Quality(recipe, model, tokenizer, held_out)
        chosen: Choice | None = broadcast(chosen)
        if chosen is None:
            return
        self.tokenizer = keep_tokens(model, tokenizer, chosen.order)
        self.facts = {**chosen.facts, "text": list(told)}
        if self.whole is not None:
            self.facts["held_out"] = self.whole.facts(model, self.tokenizer)

    def add_to(self, report: Report) -> None:
        """Let a report say it."""
        if not self.facts:
            return
        facts = report.vocabulary = dict(self.facts)
        notes = ["The dense model's quality above is with the smaller vocabulary, too."]
        report.warnings += notes if report.evaluation else []
        held_out = facts.get("held_out", {})
        if self.whole is not None and report.plan.sites:
            pruned = self.whole.facts(self.model, self.tokenizer)
            facts["held_out"] = {**held_out, "pruned": pruned}
        before, after = (held_out or facts)["tokens_per_byte"]
        if after > SPLIT * before:
            kind = "held-out" if held_out else "chosen"
            report.warnings.append(
                f"The smaller vocabulary needs {after / before - 1:.0%} more tokens for the {kind} "
                "text. Name text of that kind with --vocab-text, or keep more tokens."
            )


class _Quality:
    """What the whole vocabulary gives on held-out text, to compare a smaller one with."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, tokenizer: Any, held_out: Sequence[str]
    ) -> None:
        self.recipe, self.tokenizer, self.texts = recipe, tokenizer, held_out
        self.causal = predicts_next_token(model)
        batches = self._batches(model, tokenizer)
        self.perplexity = perplexity(model, batches)["perplexity"] if self.causal else 0.0
        self.dense = None if self.causal else DenseEncoder(model, batches)

    def facts(self, model: nn.Module, smaller: Any) -> dict[str, Any]:
        """Return tokens per byte, and bits per byte or likeness of the outputs."""
        inner = [getattr(each, "tokenizer", each) for each in (self.tokenizer, smaller)]
        plainer = [plain(each.backend_tokenizer.to_str()) for each in inner]
        rates = [tokens_per_byte(each, self.texts) for each in plainer]
        found: dict[str, Any] = {"tokens_per_byte": rates}
        batches = self._batches(model, smaller)
        if self.dense is not None:
            likeness = self.dense.compare(model, batches)
            names = ("cosine", "neighbours", "divergence", "agreement")
            return found | {name: likeness[name] for name in names if name in likeness}
        perplexities = self.perplexity, perplexity(model, batches)["perplexity"]
        bits = [math.log2(each) * rate for each, rate in zip(perplexities, rates, strict=True)]
        return found | {"bits_per_byte": bits}

    def _batches(self, model: nn.Module, tokenizer: Any) -> Any:
        given, recipe = {"packed": self.causal, "samples": self.recipe.eval_samples}, self.recipe
        found = evaluation_sequences(self.texts, tokenizer, seq_len=recipe.seq_len, **given)
        if self.causal:
            return found.batches(recipe.batch_size)
        # Not those of Sequences, which come by their length: that is another one now.
        rows = torch.arange(len(found)).split(recipe.batch_size)
        return [
            {"input_ids": found.input_ids[some], "attention_mask": found.attention_mask[some]}
            for some in rows
        ]
