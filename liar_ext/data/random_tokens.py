"""Sequences of random tokens, which a calibration set has beside those of its text.

Units that the text never moves look as if nothing were lost with them. Tokens drawn evenly from the
vocabulary move them all, need no data, and cost a forward pass over as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liar_ext.data.sequences import count_beside, seed_of
from liar_ext.errors import InputError

RANDOM_TOKENS = 0.25  # of all sequences; what it buys stands in docs/quality.md


def fraction_of(asked: float | str, causal: bool, written: bool) -> float:
    """Return the fraction of random tokens: of "auto" a quarter for language models.

    Those that write text of their own need none, and encoders gain nothing by them.
    """
    if asked != "auto":
        return float(asked)
    return RANDOM_TOKENS if causal and not written else 0.0


def random_sequences(
    rows: Sequence[Sequence[int]],
    tokenizer,
    fraction: float,
    seed: int,
    vocab_size: int | None = None,
) -> list[tuple[int, list[int]]]:
    """Return copies of some rows, evenly spread, with random tokens, and which each is of.

    Special tokens stay where they are; every other one is drawn evenly from those of the vocabulary
    that aren't special. The draw depends on the rows, so that other text has other ones beside it.

    Parameters
    ----------
    rows : sequence of sequence of int
        Token ids of each sequence of text.
    tokenizer
        A Hugging Face tokenizer.
    fraction : float
        What they are of these and those of text.
    seed : int
        Of the draw.
    vocab_size : int, optional
        Ids from there on aren't drawn, as the model has no embedding of them.

    Returns
    -------
    list of (int, list of int)
        The row that a copy is of, and its token ids.

    Raises
    ------
    InputError
        If no token of the vocabulary can be drawn.
    """
    count = count_beside(len(rows), fraction)
    if not count:
        return []
    special, plain = _vocabulary(tokenizer, vocab_size)
    generator = torch.Generator().manual_seed(seed_of(rows, seed))
    copies = []
    for step in range(count):
        index = (2 * step + 1) * len(rows) // (2 * count)
        ids = torch.tensor(rows[index])
        drawn = plain[torch.randint(len(plain), ids.shape, generator=generator)]
        copies.append((index, torch.where(torch.isin(ids, special), ids, drawn).tolist()))
    return copies


def _vocabulary(tokenizer, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the ids of special tokens, all that were added to a vocabulary, and the others."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = sorted({*tokenizer.get_vocab().values()} - special)
    if vocab_size is not None:
        plain = [token for token in plain if token < vocab_size]
    if not plain:
        raise InputError(
            "calibration: random_tokens draws tokens that aren't special, and the tokenizer has "
            "none; give random_tokens=0"
        )
    return torch.tensor(sorted(special), dtype=torch.long), torch.tensor(plain)
