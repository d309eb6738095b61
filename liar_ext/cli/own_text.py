"""The calibration text that a language model writes itself, beside the texts that a job names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from liar_ext.calibration.collect import check_finite_weights
from liar_ext.calibration.self_calibration import write_sequences
from liar_ext.checkpoint_store import Checkpoint, Stored
from liar_ext.cli.inputs import SKETCHED, Given, writes
from liar_ext.data.batches import read_batches
from liar_ext.data.sequences import count_beside, of_no_text, seed_of
from liar_ext.distributed import broadcast, is_first
from liar_ext.errors import InputError
from liar_ext.models.inputs import known_tokens
from liar_ext.recipe import Recipe

Batches = Sequence[Mapping[str, Tensor]]
WRITTEN = "written"  # its name in a checkpoint


class TextAndOwn(Sequence):
    """Batches of text, then those that are written when the first of all is asked for.

    What a job refuses it refuses before that, and so in no time. ``seconds`` are what it took.
    """

    def __init__(self, text: Batches, write: Callable[[], Batches]) -> None:
        self._text, self._write = text, write
        self._all: list[Mapping[str, Tensor]] = []
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._batches())

    def __getitem__(self, index):
        return self._batches()[index]

    def _batches(self) -> list[Mapping[str, Tensor]]:
        if not self._all:
            start = time.perf_counter()
            self._all = [*self._text, *self._write()]
            self.seconds = time.perf_counter() - start
        return self._all


def let_write(
    given: Given,
    recipe: Recipe,
    saved: Checkpoint | None = None,
    *,
    progress: bool = False,
    sketch: bool = False,
) -> None:
    """Give what was loaded the sequences that its model writes, if any, once it is gone through.

    The first rank writes, or takes what a checkpoint has, and hands it to the others. A ``sketch``
    has beginnings, again and again.
    """
    if not writes(recipe, given.model):
        return
    rows = [
        row
        for batch in read_batches(given.calibration)
        for row in batch.inputs["input_ids"][batch.source >= 0]
    ]
    count = count_beside(len(rows), recipe.self_text)
    if count == 0:
        return
    length = min(recipe.seq_len, SKETCHED) if sketch else recipe.seq_len

    def write() -> Batches:
        check_finite_weights(given.model)
        kept = None if saved is None else saved.get(WRITTEN)
        ids = None if kept is None else _read(kept[0], recipe.seq_len, given.model)
        if kept is None and is_first():
            ids = write_sequences(
                given.model,
                given.tokenizer,
                count=count,
                seq_len=recipe.seq_len,
                seed=seed_of(rows, recipe.seed),
                written=length,
                progress=progress,
            ).input_ids
        if kept is None:
            ids = broadcast(ids)
            if saved is not None:
                saved.put(WRITTEN, {"input_ids": ids})
        own = of_no_text(ids)
        given.facts["written_sequences"] = len(own)
        return own.batches(recipe.batch_size)

    given.calibration = TextAndOwn(given.calibration, write)


def _read(kept: Stored, seq_len: int, model: nn.Module) -> Tensor:
    """Return what a checkpoint has of it."""
    ids = kept["input_ids"] if "input_ids" in kept else torch.empty(0)
    known = known_tokens(model, model.config)
    if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[1] != seq_len or not len(ids):
        raise InputError(f"checkpoint: {kept.path} holds no text of this job; remove the folder")
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise InputError(f"checkpoint: {kept.path} has tokens beyond {known}; remove the folder")
    return ids
