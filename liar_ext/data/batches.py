"""Batches: what a model is run over, in one form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

FOLDS = 2


# Sensitivities scatter with the tokens compared, and with the sequences that these come from.
PROBE_SEQUENCES, PROBE_TOKENS = 4, 2048
Batches = Sequence[Mapping[str, Tensor] | Tensor]


def probe_batches(batches: Batches) -> list[dict[str, Tensor]]:
    """Return a few sequences, evenly spread: ``PROBE_TOKENS`` tokens, ``PROBE_SEQUENCES`` at least.

    Sequences of one batch stay together, so that short ones need few passes.
    """
    inputs = [batch if isinstance(batch, Mapping) else {"input_ids": batch} for batch in batches]
    places = [
        (index, row)
        for index, batch in enumerate(inputs)
        for row in range(len(next(iter(batch.values()))))
    ]
    tokens = sum(_tokens(batch) for batch in inputs)
    count = max(PROBE_SEQUENCES, math.ceil(PROBE_TOKENS * len(places) / max(tokens, 1)))
    count = min(count, len(places))
    chosen: dict[int, list[int]] = {}
    for step in range(count):
        index, row = places[(2 * step + 1) * len(places) // (2 * count)]
        chosen.setdefault(index, []).append(row)
    return [
        {key: value[rows] for key, value in inputs[index].items()} for index, rows in chosen.items()
    ]


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Return the tokens of a batch that are not padding; an image counts as a long sequence."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    if ids is not None:
        return ids.numel()
    return len(next(iter(batch.values()))) * PROBE_TOKENS // PROBE_SEQUENCES
