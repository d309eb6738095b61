"""A walk that goes on where a process that has ended was."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from liar_ext.data.hidden_states import Held
from liar_ext.reconstruction.walk import Walk
from liar_ext.report.rows import SiteRow
from liar_ext.saved.progress import Progress

STREAMS = "walk-streams"


class SavedWalk:
    """Keeps the blocks of a walk that are done, and both streams after the last of them.

    New weights and rows are kept for each block; the streams take the place of those before, no
    more often than takes a twentieth of the time. A walk goes on from where they are, and solves
    the blocks after it once more, to the same bits.

    Parameters
    ----------
    saved : Progress
        Where they are kept.
    blocks : int
        How many the walk has.
    """

    def __init__(self, saved: Progress, blocks: int) -> None:
        self.saved, self.blocks = saved, blocks

    def done(self) -> int:
        """Return how many blocks the streams are past."""
        known = self.saved.get(STREAMS)
        return 0 if known is None else known.facts["blocks"]

    def restore(self, walk: Walk) -> int:
        """Take a walk that has started to where the streams are; return the block that is next."""
        known = self.saved.get(STREAMS)
        if known is None:
            return 0
        walk.blocks.beside = known.facts["beside"]
        streams = _streams(walk)
        for name in known.names():
            streams[name].set(known.tensor(name))
        return known.facts["blocks"]

    def block(self, index: int, walk: Walk) -> None:
        """Give a walk the weights and rows of a block that is done."""
        known = self.saved.need(f"walk-{index}")
        for name in known.facts["rows"]:
            weight = known.tensor(f"{name}.weight")
            bias = f"{name}.bias" in known.names()
            walk.weights[name] = weight, known.tensor(f"{name}.bias") if bias else None
            walk.rows[name] = SiteRow(**known.facts["rows"][name])

    def keep(self, index: int, walk: Walk) -> None:
        """Keep a block that the walk has done."""
        names = [site.name for site in walk.blocks.sites[index] if site.name in walk.rows]
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[f"{name}.weight"], bias = walk.weights[name]
            tensors |= {} if bias is None else {f"{name}.bias": bias}
        rows = {name: asdict(walk.rows[name]) for name in names}
        self.saved.put(f"walk-{index}", tensors, {"rows": rows})
        if self.saved.due(STREAMS):
            done = index + 1
            said = f"{done} of {self.blocks} blocks"
            facts = {"blocks": done, "beside": walk.blocks.beside, "said": said}
            self.saved.put(STREAMS, _streams(walk), facts)


def _streams(walk: Walk) -> dict[str, Held]:
    """Return both streams of a walk by name."""
    found = {}
    for number, part in enumerate(walk.parts):
        found |= {f"{number}.dense": part.dense, f"{number}.pruned": part.pruned}
    return found
