"""What is measured on the whole model, on text that passes the blocks with the calibration set."""

from __future__ import annotations

import torch

from liar_ext.data.batches import Batch, Batches, read_batches
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.distributed import alone
from liar_ext.evaluation import perplexity
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.selection.divergence import Divergence
from liar_ext.streaming.block_store import BlockStore
from liar_ext.streaming.trace import Trace


class Judged:
    """Perplexity on held-out text and divergence on fresh text, of the model that a walk passes.

    Parameters
    ----------
    store : BlockStore
        The model.
    states : HiddenStates
        Where hidden states are held.
    held_out, fresh : iterable of mapping, optional
        As ``evaluate_on`` and ``certify_on`` of :func:`liar_ext.prune`.
    progress : bool
        Show progress bars.
    """

    def __init__(
        self,
        store: BlockStore,
        states: HiddenStates,
        held_out: Batches | None,
        fresh: Batches | None,
        *,
        progress: bool = False,
    ) -> None:
        self.model, self.progress = store.model, progress
        self._held_out = self._fresh = None
        if held_out is not None:
            self._held_out = Trace(store, map(_as_judged, read_batches(held_out)), states)
        if fresh is not None:
            self._fresh = Trace(store, fresh, states)

    def streams(self) -> dict[str, list[Held]]:
        """Return the hidden states of all text, by name."""
        traces = {"held out": self._held_out, "fresh": self._fresh}
        return {name: trace.hidden for name, trace in traces.items() if trace is not None}

    def advance(self, blocks: Blocks, index: int) -> None:
        """Take all text past a block."""
        for trace in (self._held_out, self._fresh):
            if trace is not None:
                trace.advance(blocks, index)

    def perplexity(self, blocks: Blocks) -> dict[str, float] | None:
        """Return what :func:`liar_ext.evaluation.perplexity` does, after the last block."""
        if self._held_out is None:
            return None
        with self._held_out.answering(blocks):
            return perplexity(self.model, self._held_out.batches, progress=self.progress)

    def outputs(self, blocks: Blocks) -> Divergence | None:
        """Return the dense model's outputs, to compare others with, after the last block."""
        if self._fresh is None:
            return None
        with self._fresh.answering(blocks), alone():
            return Divergence(self.model, [batch.inputs for batch in self._fresh.batches])

    def divergence(self, blocks: Blocks, dense: Divergence | None) -> dict[str, float] | None:
        """Return how far the model's outputs are from the dense ones, after the last block."""
        if self._fresh is None or dense is None:
            return None
        with self._fresh.answering(blocks), alone():
            return dense.of(self.model)


def _as_judged(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch as the model gets it where its perplexity is measured."""
    ids = batch.inputs["input_ids"]
    mask = torch.ones_like(ids) if batch.mask is None else batch.mask.to(ids.dtype)
    return {"input_ids": ids, "attention_mask": mask}
