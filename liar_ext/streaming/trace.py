"""Run a few sequences through a model whose blocks are in memory one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from liar_ext.data.batches import Batches, read_batches
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.models.running import evaluating
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.streaming.block_store import BlockStore


class Trace:
    """Batches on their way through the blocks; in the end the model answers for them.

    Parameters
    ----------
    store : BlockStore
        The model, dense or with every block sliced before :meth:`advance` is called for it.
    batches : iterable of mapping
        What to run.
    states : HiddenStates
        Where hidden states are held.
    """

    def __init__(self, store: BlockStore, batches: Batches, states: HiddenStates) -> None:
        self.store, self.model, self.states = store, store.model, states
        self.batches = list(read_batches(batches))
        self.hidden: list[Held] = []

    def begin(self, blocks: Blocks) -> None:
        """Take all batches to the first block, unless they have begun."""
        if not self.hidden:
            entered = (blocks.enter(0, inputs)[0][0] for inputs in self._inputs())
            self.hidden += [self.states.hold(hidden) for hidden in entered]

    def advance(self, blocks: Blocks, index: int) -> None:
        """Take all batches past a block, which is in memory."""
        self.begin(blocks)
        for inputs, held in zip(self._inputs(), self.hidden, strict=True):
            held.set(blocks.run(index, inputs, held.get().to(self.store.device)).output)

    @contextmanager
    def answering(self, blocks: Blocks) -> Iterator[None]:
        """Let the model's forward answer for the batches, one call for each, in their order."""
        rest = iter(self.hidden)

        def give() -> Tensor:
            return next(rest).get().to(self.store.device)

        with torch.no_grad(), evaluating(self.model), blocks.opened(), self.store.head():
            with blocks.answering({len(blocks) - 1: give}):
                yield

    def _inputs(self) -> Iterator[dict[str, Tensor]]:
        return (batch.to(self.store.device).inputs for batch in self.batches)
