"""A walk over the blocks in its checkpoint, from which an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from liar_ext.checkpoint_store import Checkpoint, reading
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.ranks import Ranks
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.reconstruction.streams import Part
from liar_ext.rows import SiteRow

Weights = Mapping[str, tuple[Tensor, Tensor | None]]
ALL = -1  # the ranks that have the same hidden states


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
    placed : callable, optional
        Returns for the name of a stream the rank of each of its hidden states by number, ``ALL``
        for every rank; None if the first rank has the whole stream.
    """

    def __init__(
        self,
        saved: Checkpoint | None,
        walk: str,
        blocks: int,
        placed: Callable[[str], Mapping[int, int] | None] = lambda name: None,
    ) -> None:
        self.saved, self.walk, self.blocks, self.placed = saved, walk, blocks, placed
        self.key = f"{walk}-streams"

    def restore(self, blocks: Blocks, streams: dict[str, list[Held]], states: HiddenStates) -> int:
        """Put saved hidden states into ``streams``; return the number of blocks behind them.

        Those of a known name are replaced, others are held in ``states``. Each rank takes its own.
        """
        known = None if self.saved is None else self.saved.get(self.key)
        if known is None:
            return 0
        tensors, facts = known
        with reading(self.saved.path(self.key)):
            done, blocks.beside, saved = (facts[name] for name in ("blocks", "beside", "streams"))
        for name, numbers in saved.items():
            placed, at = self.placed(name) or {}, 0
            for number in numbers:
                tensor = tensors[f"{name}/{number}"]
                if placed.get(number, 0) not in (self.saved.ranks.rank, ALL):
                    continue
                into = streams.setdefault(name, [])
                if at < len(into):
                    into[at].set(tensor)
                else:
                    into.append(states.hold(tensor))
                at += 1
        return done

    def keep(
        self, done: int, blocks: Blocks, streams: Mapping[str, list[Held]], *, now: bool = False
    ) -> None:
        """Save the hidden states after ``done`` blocks if that is due, or ``now``."""
        if self.saved is None:
            return
        ranks = self.saved.ranks
        if not ranks.broadcast(now or self.saved.due(self.key)):
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
        self.saved.put_shared(self.key, each, facts)


def placed_by_number(ranks: Ranks, parts: Sequence[Part]) -> dict[int, int]:
    """Return which rank has which part of a walk, of which this one has some."""
    shares = enumerate(ranks.share([part.number for part in parts]))
    return {number: rank for rank, share in shares for number in share}


def keep_block(
    saved: Checkpoint | None, index: int, weights: Weights, rows: Mapping[str, SiteRow]
) -> None:
    """Save new weights and rows of a block."""
    if saved is not None:
        tensors = {f"{name}.weight": weight for name, (weight, _) in weights.items()}
        tensors |= {f"{name}.bias": bias for name, (_, bias) in weights.items() if bias is not None}
        saved.put(f"block-{index}", tensors, {"rows": {n: asdict(rows[n]) for n in weights}})


def kept_block(
    saved: Checkpoint, index: int
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, SiteRow]]:
    """Return saved weights and rows of a block."""
    stored, facts = saved.need(f"block-{index}")
    with reading(stored.path):
        tensors, rows = dict(stored), {n: SiteRow(**row) for n, row in facts["rows"].items()}
        return {n: (tensors[f"{n}.weight"], tensors.get(f"{n}.bias")) for n in rows}, rows
