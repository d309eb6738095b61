"""A walk over the blocks that goes on where a process that has ended was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.distributed import broadcast, gather, is_first
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.rows import SiteRow
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
    numbers : callable, optional
        Gives for the name of a stream the numbers of the hidden states that this rank has of it;
        None where the first one has the whole stream.
    """

    def __init__(
        self,
        saved: Progress | None,
        name: str,
        blocks: int,
        numbers: Callable[[str], Sequence[int] | None] = lambda name: None,
    ) -> None:
        self.saved, self.walk, self.blocks, self.numbers = saved, name, blocks, numbers
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
        for name, every in known.facts["streams"].items():
            mine, at = self.numbers(name), 0
            if mine is not None:
                streams.setdefault(name, [])
            for number in every:
                tensor = known.tensor(f"{name}/{number}")
                if not (is_first() if mine is None else number in mine):
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
        if not broadcast(now or self.saved.due(self.name)):
            return
        own = {name: self.numbers(name) or range(len(some)) for name, some in streams.items()}
        each = {
            f"{name}/{number}": held
            for name, some in streams.items()
            for number, held in zip(own[name], some, strict=True)
        }
        every: dict[str, list[int]] = {}
        for share in gather({name: list(numbers) for name, numbers in own.items()}):
            for name, numbers in share.items():
                every[name] = sorted([*every.get(name, ()), *numbers])
        facts = {"blocks": done, "beside": blocks.beside, "streams": every}
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
