"""Hidden states of the calibration text on its way through the blocks, in both models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from liar_ext.data.batches import Batch
from liar_ext.data.hidden_states import Held
from liar_ext.models.inputs import complete_inputs


@dataclass
class Stream:
    """Hidden states of some sequences, (sequences, tokens, hidden), in one of both models.

    Parameters
    ----------
    now : Held
        Before the block that comes next.
    behind : dict of int to Held
        What came out of the stacks before, as far as a later one reads it, by the last block.
    """

    now: Held
    behind: dict[int, Held] = field(default_factory=dict)

    def get(self) -> Tensor:
        """Return the hidden states before the block that comes next."""
        return self.now.get()

    def answers(self, sequences: int | None = None) -> dict[int, Callable[[], Tensor]]:
        """Return what :meth:`Blocks.answering` takes, of the first ``sequences`` or of all."""
        return {end: partial(_first, held, sequences) for end, held in self.behind.items()}


@dataclass
class Part:
    """Sequences of one fold, or fresh ones, and how far they are.

    Parameters
    ----------
    batch : Batch
        As the model takes them.
    fold : int, optional
        Their fold; None where they are fresh: no solve reads them, errors are measured on them.
    number : int
        Which of all parts it is, whatever ranks there are.
    dense, pruned : Stream
        Both streams.
    goals : dict of str to Held
        By layer of the block in work, what the dense model has there: the output of the consumer,
        or the stream after it.
    halfway : (Held, Held), optional
        The pruned stream between attention and MLP of the block in work, and what the MLP's
        consumer reads: all that a new one needs to finish the block.
    """

    batch: Batch
    fold: int | None
    number: int
    dense: Stream
    pruned: Stream
    goals: dict[str, Held] = field(default_factory=dict)
    halfway: tuple[Held, Held] | None = None


def with_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with what the decoder reads where an encoder is there, too."""
    return replace(batch, inputs=complete_inputs(model, batch.inputs, batch.labels))


def _first(held: Held, sequences: int | None) -> Tensor:
    return held.get()[:sequences]
