"""A walk over the blocks that goes on where a process that has ended was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.ranks import Ranks
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.streams import Part
from liar_ext.rows import SiteRow
from liar_ext.saved.progress import Progress

Weights = Mapping[str, tuple[Tensor, Tensor | None]]
ALL = -1  # the ranks that have the same hidden states


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
    placed : callable, optional
        Gives for the name of a stream which rank has which of its hidden states, by their number,
        ``ALL`` where every rank has them; None where the first one has the whole stream.
    """

    def __init__(
        self,
        saved: Progress | None,
        name: str,
        blocks: int,
        placed: Callable[[str], Mapping[int, int] | None] = lambda name: None,
    ) -> None:
        self.saved, self.walk, self.blocks, self.placed = saved, name, blocks, placed
        self.name = f"{name}-streams"

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
            placed, at = self.placed(name) or {}, 0
            for key, rank in ((f"{name}/{number}", placed.get(number, 0)) for number in numbers):
                tensor = known.tensor(key) if rank == ALL else known.tensor_at(key, rank)
                if tensor is None:  # it is another rank's
                    continue
                into = streams.setdefault(name, [])
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
        ranks = self.saved.ranks
        if not ranks.broadcast(now or self.saved.due(self.name)):
            return
        each, own = {}, {}
        for name, some in streams.items():
            placed = self.placed(name) or dict.fromkeys(range(len(some)), 0)
            own[name] = sorted(placed)
            here = [n for n in own[name] if placed[n] in (ranks.rank, ALL)]
            if ranks.first or ALL not in placed.values():
                each |= {f"{name}/{n}": held for n, held in zip(here, some, strict=True)}
        shares = reversed(ranks.share(own))  # of a stream of its own the first one knows
        every = {name: numbers for share in shares for name, numbers in share.items()}
        facts = {"blocks": done, "beside": blocks.beside, "streams": every}
        if not now:
            facts["said"] = f"{self.walk}: {done} of {self.blocks} blocks"
        self.saved.put_shared(self.name, each, facts)


def placed_by_number(ranks: Ranks, parts: Sequence[Part]) -> dict[int, int]:
    """Return which rank has which part of a walk, of which this one has some."""
    shares = enumerate(ranks.share([part.number for part in parts]))
    return {number: rank for rank, share in shares for number in share}


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
