"""``--keep-vocab``: the model and its tokenizer with fewer tokens, before any text is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from liar_ext.calibration.batches import Batches
from liar_ext.calibration.generated import SELF
from liar_ext.distributed import alone, broadcast, is_first
from liar_ext.errors import InputError
from liar_ext.job.sharing import share_budget
from liar_ext.measure.vocabulary_quality import (
    JUDGED_DOCUMENTS,
    JUDGED_PIECES,
    VocabularyQuality,
    held_out_of,
    smallest,
)
from liar_ext.models.running import predicts_next_token
from liar_ext.recipe import Recipe
from liar_ext.report.report import Report
from liar_ext.vocabulary.keep import Choice, Counted, keep_tokens

SPLIT = 1.05  # times as many tokens per byte as before, from which on a warning says so
MORE = 0.02  # more of them on held-out text than on the text that chose


class SmallerVocabulary:
    """What a recipe leaves of the vocabulary, and how much that changes.

    The model is changed in place; ``tokenizer`` is the new one. Everything is as before if the
    recipe keeps all tokens. ``draw`` returns the calibration set as the old tokenizer reads it,
    for a budget that tokens share.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: Any,
        read: Mapping[str, Sequence[str]],
        held_out: Sequence[str] | None,
        draw: Callable[[], Batches],
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, {}
        self._draw, self._progress = draw, progress
        self.whole: VocabularyQuality | None = None
        if recipe.keep_vocab == 1.0:
            return
        told = list(dict.fromkeys(recipe.vocab_text or recipe.calibration))
        if SELF in told:
            raise InputError(
                "vocabulary: text that the model generates can't decide which tokens stay; name a "
                "text with --vocab-text"
            )
        chosen, facts = None, {}
        if is_first():
            texts = [text for source in told for text in read[source]]
            chosen, facts = self._choose(recipe, texts)
            if chosen and held_out:
                self.whole = self._quality(recipe, held_out, recipe.eval_samples)
        chosen, facts = broadcast((chosen, facts))
        self.facts = {**facts, "text": told} if facts else {}
        if chosen is None:
            model.liar_vocabulary = None  # all tokens stay, which a job need not ask for
        else:
            self.tokenizer = keep_tokens(model, tokenizer, chosen)
        if self.whole is not None:
            self.facts["held_out"] = self.whole.compare(model, self.tokenizer)

    def _choose(self, recipe: Recipe, texts: Sequence[str]) -> tuple[Choice | None, dict[str, Any]]:
        """Return the tokens that stay, and what is known of them; without any if all do."""
        count = partial(Counted, self.model, self.tokenizer, scripts=recipe.vocab_scripts)
        if recipe.keep_vocab != "auto":
            chosen = count(texts).choose(recipe.keep_vocab)
            return chosen, chosen.facts if chosen else {}
        texts, judging = held_out_of(texts)
        most = JUDGED_PIECES if predicts_next_token(self.model) else JUDGED_DOCUMENTS
        counted, quality = count(texts), self._quality(recipe, judging, most)
        given = counted, self.model, self.tokenizer, quality
        if recipe.of == "params" and recipe.keep < 1:
            with alone():
                chosen, auto = share_budget(*given, recipe, self._draw(), self._progress)
        else:
            chosen, auto = smallest(*given)
        whole = {"before": counted.size, "after": counted.size}
        whole |= {"kind": counted.pieces.kind_in_words, "kept_of_text": 1.0}
        facts = (chosen.facts if chosen else whole) | {"auto": auto}
        return chosen and replace(chosen, facts=facts), facts

    def _quality(
        self, recipe: Recipe, texts: Sequence[str], samples: int | None
    ) -> VocabularyQuality:
        how = {"seq_len": recipe.seq_len, "batch_size": recipe.batch_size, "samples": samples}
        return VocabularyQuality(self.model, self.tokenizer, texts, **how)

    def add_to(self, report: Report, model: nn.Module) -> None:
        """Let the report of a pruned model say it."""
        if not self.facts:
            return
        facts = report.vocabulary = dict(self.facts)
        if facts["after"] == facts["before"]:
            report.warnings.append(
                "All tokens stay: with fewer of them the pruned model loses more on held-out text."
                if facts["auto"]["most_loss"] is None
                else "All tokens stay: each smaller vocabulary loses more on held-out text than "
                "auto allows. Give more text with --vocab-text, or a number of tokens."
            )
            return
        notes = ["The dense model's quality above is with the smaller vocabulary, too."]
        report.warnings += notes if report.evaluation else []
        held_out = facts.get("held_out", {})
        if self.whole is not None and report.plan.sites:
            pruned = self.whole.compare(model, self.tokenizer)
            facts["held_out"] = {**held_out, "pruned": pruned}
        report.warnings += split_warnings(facts["tokens_per_byte"], held_out)


def split_warnings(chosen: Sequence[float], held_out: Mapping[str, Any]) -> list[str]:
    """Return warnings of tokens per byte, before and after, of the text that chose and of other."""
    before, after = held_out.get("tokens_per_byte", chosen)
    more, of_chosen = after / before - 1, chosen[1] / chosen[0] - 1
    advice = "Name text of that kind with --vocab-text, or keep more tokens."
    if held_out and more > of_chosen + MORE:
        return [
            f"The smaller vocabulary needs {more:.0%} more tokens for the held-out text, and "
            f"{of_chosen:.0%} more for the text that chose it. Name more text of the held-out kind "
            "with --vocab-text, or keep more tokens."
        ]
    if 1 + more > SPLIT:
        kind = "held-out" if held_out else "chosen"
        return [
            f"The smaller vocabulary needs {more:.0%} more tokens for the {kind} text. {advice}"
        ]
    return []
