"""A walk over the blocks that goes on where a process that has ended was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.report.rows import SiteRow
from liar_ext.saved.progress import Progress

Weights = Mapping[str, tuple[Tensor, Tensor | None]]


class SavedStreams:
    """All hidden states that walk along, kept after a block; those before are replaced at once.

    That is done no more often than takes a twentieth of the time; a walk goes on from where they
    are, and does the blocks after it once more, to the same bits.

    Parameters
    ----------
    saved : Progress, optional
        Where they are kept; nowhere if not given.
    name : str
        Of the walk.
    blocks : int
        How many it has.
    numbers : sequence of int, optional
        Which of all hidden states of a stream this rank has, ascending; all of them if not given.
    """

    def __init__(
        self,
        saved: Progress | None,
        name: str,
        blocks: int,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.saved, self.walk, self.blocks = saved, name, blocks
        self.name, self.numbers = f"{name}-streams", numbers
        self.owner: dict[int, int] = {}  # who has which, if that is given
        if saved is not None and numbers is not None:
            shares = enumerate(saved.ranks.share(list(numbers)))
            self.owner = {number: rank for rank, share in shares for number in share}

    def restore(self, blocks: Blocks, streams: dict[str, list[Held]], states: HiddenStates) -> int:
        """Put hidden states that are kept into ``streams``; return how many blocks they are past.

        Those that are there by that name are replaced, others are held in ``states``. Each rank
        gets what it has of them, whoever had it.
        """
        known = None if self.saved is None else self.saved.get(self.name)
        if known is None:
            return 0
        blocks.beside = known.facts["beside"]
        for name, numbers in known.facts["streams"].items():
            into, at = streams.setdefault(name, []), 0
            for number in numbers:
                tensor = known.tensor_at(f"{name}/{number}", self.owner.get(number, 0))
                if tensor is None:  # it is another rank's
                    continue
                if at < len(into):
                    into[at].set(tensor)
                else:
                    into.append(states.hold(tensor))
                at += 1
        return known.facts["blocks"]

    def keep(
        self, done: int, blocks: Blocks, streams: Mapping[str, list[Held]], *, now: bool = False
    ) -> None:
        """Keep the hidden states that are past ``done`` blocks, if it is time to."""
        if self.saved is None:
            return
        if not self.saved.ranks.broadcast(now or self.saved.due(self.name)):
            return
        each, facts = {}, {"blocks": done, "beside": blocks.beside, "streams": {}}
        for name, some in streams.items():
            numbers = list(range(len(some))) if self.numbers is None else self.numbers
            each |= {f"{name}/{i}": held for i, held in zip(numbers, some, strict=True)}
            facts["streams"][name] = sorted(self.owner) or numbers
        if not now:
            facts["said"] = f"{self.walk}: {done} of {self.blocks} blocks"
        self.saved.put_shared(self.name, each, facts)


def keep_block(
    saved: Progress | None, index: int, weights: Weights, rows: Mapping[str, SiteRow]
) -> None:
    """Keep the new weights and the rows of a block."""
    if saved is None:
        return
    tensors = {f"{name}.weight": weight for name, (weight, _) in weights.items()}
    tensors |= {f"{name}.bias": bias for name, (_, bias) in weights.items() if bias is not None}
    saved.put(f"block-{index}", tensors, {"rows": {n: asdict(rows[n]) for n in weights}})


def kept_block(
    saved: Progress, index: int
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, SiteRow]]:
    """Return new weights and rows of a block that was kept."""
    known = saved.need(f"block-{index}")
    tensors, rows = known.tensors(), known.facts["rows"]
    weights = {name: (tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in rows}
    return weights, {name: SiteRow(**row) for name, row in rows.items()}


def named(weights: Weights, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return those of some sites, as far as they are there."""
    return {name: weights[name] for name in names if name in weights}
