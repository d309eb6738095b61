"""A walk over the blocks in its checkpoint, from which an interrupted one goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from liar_ext.checkpoint_store import Checkpoint, reading
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.distributed import broadcast, is_first
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.rows import SiteRow

Weights = dict[str, tuple[Tensor, Tensor | None]]
Streams = dict[str, list[Held]]


class SavedStreams:
    """All hidden states of a walk after a block, in the place of those after the block before.

    They are saved as often as a twentieth of the time allows. A walk goes on from there, and does
    later blocks again, to the same bits.

    Parameters
    ----------
    saved : Checkpoint, optional
        Nothing is kept without it.
    walk : str
        Name of the walk.
    blocks : int
        Number of its blocks.
    numbers : callable, optional
        Returns for the name of a stream the numbers of those hidden states that this rank has;
        None if the first rank has the whole stream.
    """

    def __init__(
        self,
        saved: Checkpoint | None,
        walk: str,
        blocks: int,
        numbers: Callable[[str], Sequence[int] | None] = lambda name: None,
    ) -> None:
        self.saved, self.walk, self.blocks, self.numbers = saved, walk, blocks, numbers
        self.key = f"{walk}-streams"

    def restore(self, blocks: Blocks, streams: Streams, states: HiddenStates) -> int:
        """Put saved hidden states into ``streams``; return the number of blocks behind them.

        Those of a known name are replaced, others are held in ``states``. Each rank takes its own.
        """
        known = None if self.saved is None else self.saved.get(self.key)
        if known is None:
            return 0
        tensors, facts = known
        with reading(self.saved.path(self.key)):
            parts = (name.rpartition("/") for name in tensors)
            every = sorted((name, int(number)) for name, _, number in parts)
            done, blocks.beside = facts["blocks"], facts["beside"]
        taken: Counter[str] = Counter()
        for name, number in every:
            tensor, numbers = tensors[f"{name}/{number}"], self.numbers(name)
            if numbers is not None:  # of which this rank may have none
                streams.setdefault(name, [])
            if is_first() if numbers is None else number in numbers:
                into = streams.setdefault(name, [])
                if taken[name] < len(into):
                    into[taken[name]].set(tensor)
                else:
                    into.append(states.hold(tensor))
                taken[name] += 1
        return done

    def keep(
        self, done: int, blocks: Blocks, streams: Mapping[str, list[Held]], *, now: bool = False
    ) -> None:
        """Save the hidden states after ``done`` blocks if that is due, or ``now``."""
        if self.saved is None:
            return
        if not broadcast(now or self.saved.due(self.key)):
            return
        mine = {}
        for name, some in streams.items():
            numbers = self.numbers(name)
            numbers = range(len(some)) if numbers is None else numbers
            mine |= {f"{name}/{n}": held for n, held in zip(numbers, some, strict=True)}
        facts = {"blocks": done, "beside": blocks.beside}
        if not now:
            facts["said"] = f"{self.walk}: {done} of {self.blocks} blocks"
        self.saved.put_shared(self.key, mine, facts)


def keep_block(
    saved: Checkpoint | None, index: int, weights: Weights, rows: Mapping[str, SiteRow]
) -> None:
    """Save new weights and rows of a block."""
    if saved is not None:
        tensors = {f"{name}.weight": weight for name, (weight, _) in weights.items()}
        tensors |= {f"{name}.bias": bias for name, (_, bias) in weights.items() if bias is not None}
        saved.put(f"block-{index}", tensors, {"rows": {n: asdict(rows[n]) for n in weights}})


def kept_block(saved: Checkpoint, index: int) -> tuple[Weights, dict[str, SiteRow]]:
    """Return saved weights and rows of a block."""
    stored, facts = saved.need(f"block-{index}")
    with reading(stored.path):
        tensors, rows = dict(stored), {n: SiteRow(**row) for n, row in facts["rows"].items()}
        return {n: (tensors[f"{n}.weight"], tensors.get(f"{n}.bias")) for n in rows}, rows
