"""``--keep-vocab`` in a job: which tokens stay, alone or in a budget with heads and channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from liar_ext.calibration.batches import Batches
from liar_ext.calibration.generated import SELF
from liar_ext.checkpoint.folder import count_params
from liar_ext.job.sweeping import PROBE_KEEP, Sweep
from liar_ext.job.vocabulary import (
    JUDGED_DOCUMENTS,
    JUDGED_PIECES,
    SMALLER,
    VocabularyQuality,
    held_out_of,
    smaller_copy,
    smallest,
)
from liar_ext.models.running import predicts_next_token
from liar_ext.recipe import Recipe
from liar_ext.report.report import Report
from liar_ext.report.tables import measured
from liar_ext.system.distributed import alone, broadcast, is_first
from liar_ext.system.errors import InputError
from liar_ext.vocabulary.keep import STEP, Choice, Counted, keep_tokens, size_of

HALVINGS = 2  # how often the steps around the best size are halved
SAME_VOCABULARY = "The dense model's quality above was also measured with the smaller vocabulary."
SPLIT = 1.05  # times as many tokens per byte as before, from which on a warning says so
MORE = 0.02  # more of them on held-out text than on the text that chose


def shares_budget(recipe: Recipe) -> bool:
    """Tell whether the size of the vocabulary is chosen in one budget with heads and channels.

    Not with fewer hidden features, experts or blocks: ``keep`` is of the smaller model then.
    """
    whole = recipe.keep_hidden == recipe.keep_experts == recipe.keep_blocks == 1.0
    return recipe.keep_vocab == "auto" and recipe.of == "params" and recipe.keep < 1 and whole


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
    ) -> None:
        self.model, self.tokenizer, self.facts, self.notes = model, tokenizer, {}, []
        self._draw, self.whole = draw, None
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
            if not facts:
                self.notes = [f"All tokens stay: --keep-vocab {recipe.keep_vocab:,} removes none."]
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
        if shares_budget(recipe):
            with alone():
                chosen, auto = share_budget(counted, quality, recipe, self._draw())
        else:
            chosen, auto = smallest(counted, quality)
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
        report.warnings += self.notes
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
        held_out = found = facts.get("held_out", {})
        if self.whole is not None and report.plan.sites:
            found = self.whole.compare(model, self.tokenizer)
            facts["held_out"] = {**held_out, "pruned": found}
        if "pruned" in report.evaluation:  # encoders: from the model with all tokens
            report.evaluation["pruned"] = {**report.evaluation["pruned"], **measured(found)}
        if report.evaluation and ("certified" in report.evaluation or not measured(found)):
            report.warnings.append(SAME_VOCABULARY)
        report.warnings += split_warnings(facts["tokens_per_byte"], held_out)


def share_budget(
    counted: Counted, quality: VocabularyQuality, recipe: Recipe, batches: Batches
) -> tuple[Choice | None, dict[str, Any]]:
    """Return the vocabulary with which a model pruned to the whole budget loses least.

    Each size is tried with heads and channels pruned in one pass to what its tokens leave of the
    budget, and measured on text that chose no token. Sizes fall by a quarter until the loss grows;
    then those halfway to both neighbours of the best are tried. Moments, scores and sensitivities
    are computed once, with all tokens. Returns None if all tokens stay, and the sizes tried.
    InputError if no size meets the budget, or outputs of different vocabularies don't compare.
    """
    model, tokenizer = counted.model, counted.tokenizer
    quality.check_judges(model)
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
    for size in _sizes(counted.size):
        try:
            measure(size)
        except InputError as error:  # sites can't go down so far, or more tokens must stay
            refused = refused or error
        if tried and best() != min(tried):
            break
    if not tried:
        raise refused
    for _ in range(HALVINGS):
        for size in _between(sorted(tried), best()):
            measure(size)
    curve = [tried[size] for size in sorted(tried)]
    return choices[best()], {"curve": curve, "judged_by": quality.judged_by, "most_loss": None}


def _sizes(size: int) -> Iterator[int]:
    """Yield sizes from all tokens on, each about three quarters of the one before."""
    yield size
    before = size
    # Rounding to multiples of 64 ends it: three quarters of 128 are 128 again.
    while (found := size_of(int(before * SMALLER), size)) < before:
        yield found
        before = found


def _between(sizes: list[int], best: int) -> list[int]:
    at = sizes.index(best)
    around = [each for each in (at - 1, at + 1) if 0 <= each < len(sizes)]
    halfway = {STEP * round((best + sizes[each]) / 2 / STEP) for each in around}
    return sorted(halfway - {*sizes})


def split_warnings(chosen: Sequence[float], held_out: Mapping[str, Any]) -> list[str]:
    """Return warnings of tokens per byte, before and after, of the text that chose and of other."""
    before, after = held_out.get("tokens_per_byte", chosen)
    more, of_chosen = after / before - 1, chosen[1] / chosen[0] - 1
    needs = f"The smaller vocabulary needs {more:.0%} more tokens for the"
    if held_out and more > of_chosen + MORE:
        return [
            f"{needs} held-out text, and {of_chosen:.0%} more for the text that chose it. Name "
            "more text of the held-out kind with --vocab-text, or keep more tokens."
        ]
    if 1 + more > SPLIT:
        kind = "held-out" if held_out else "chosen"
        advice = "Name text of that kind with --vocab-text, or keep more tokens."
        return [f"{needs} {kind} text. {advice}"]
    return []
