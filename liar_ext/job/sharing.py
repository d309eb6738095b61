"""One budget of parameters for tokens, heads and channels: what loses least together is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from liar_ext.calibration.batches import Batches
from liar_ext.checkpoint.fingerprint import count_params
from liar_ext.errors import InputError
from liar_ext.job.sweeping import PROBE_KEEP, Sweep
from liar_ext.measure.vocabulary_quality import SMALLER, VocabularyQuality, smaller_copy
from liar_ext.recipe import Recipe
from liar_ext.vocabulary.keep import STEP, Choice, Counted, size_of

HALVINGS = 2  # how often the steps around the best size are halved


def share_budget(
    counted: Counted,
    model: nn.Module,
    tokenizer: Any,
    quality: VocabularyQuality,
    recipe: Recipe,
    batches: Batches,
    progress: bool = False,
) -> tuple[Choice | None, dict[str, Any]]:
    """Return the vocabulary with which a model pruned to the whole budget loses least.

    Each size is tried with heads and channels pruned in one pass to what its tokens leave of the
    budget, and measured on text that chose no token. Sizes fall by a quarter until the loss grows;
    then those halfway to both neighbours of the best are tried. Moments, scores and sensitivities
    are computed once, with all tokens. Returns None if all tokens stay, and the sizes tried.

    Raises
    ------
    InputError
        If no size meets the budget, or outputs of different vocabularies don't compare.
    """
    quality.check_judges(model)
    fixed = replace(recipe, schedule="one-pass", keep_vocab=1.0, vocab_text=(), vocab_scripts=())
    work = Sweep(model, batches, progress=progress, probe_keep=PROBE_KEEP)
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
            refused = error
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
    """Yield sizes from all tokens on, each three quarters of the one before."""
    found = size
    while found > STEP:
        yield found
        found = size_of(int(found * SMALLER), size)


def _between(sizes: list[int], best: int) -> list[int]:
    """Return the multiples of 64 halfway from a size to its neighbours among sizes."""
    at = sizes.index(best)
    around = [each for each in (at - 1, at + 1) if 0 <= each < len(sizes)]
    halfway = {STEP * round((best + sizes[each]) / 2 / STEP) for each in around}
    return sorted(halfway - {*sizes})
