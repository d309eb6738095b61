"""What the first walk of a streamed job finds, block by block, in its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liar_ext.calibration.moments import Moments
from liar_ext.data.hidden_states import Held
from liar_ext.reconstruction.saved_walk import SavedStreams
from liar_ext.saved.progress import Progress
from liar_ext.streaming.judging import Judged
from liar_ext.streaming.passes import StreamedPasses
from liar_ext.streaming.probes import ProbeStreams

NAME, PARTS = "calibration", ("gram", "total", "count")


class FirstWalk:
    """Keeps scores, error curves and sums of the blocks that are done, and what walks along.

    Parameters
    ----------
    saved : Progress, optional
        Where; nowhere if not given.
    passes : StreamedPasses
        The walk.
    probes : ProbeStreams, optional
        Its probes.
    dense : Judged
        The text that the dense model is judged on.
    """

    def __init__(
        self,
        saved: Progress | None,
        passes: StreamedPasses,
        probes: ProbeStreams | None,
        dense: Judged,
    ) -> None:
        self.saved, self.passes, self.probes, self.dense = saved, passes, probes, dense
        self.kept = SavedStreams(saved, NAME, len(passes.blocks), self._numbers)

    def restore(self) -> dict[str, Tensor]:
        """Take all to where the hidden states are that were kept; return the scores up to there."""
        passes, scores, streams = self.passes, {}, self._streams()
        done = self.kept.restore(passes.blocks, streams, passes.states)
        for index in range(done):
            known = self.saved.need(f"{NAME}-{index}")
            for each in known.names():
                what, _, name = each.partition("/")
                if what == "score":
                    scores[name] = known.tensor(each)
                elif what == "curve" and self.probes is not None:
                    self.probes.curves[name] = known.tensor(each)
            if self.probes is not None:
                self.probes.errors |= known.facts["errors"]
            passes.source["tokens"] = known.facts["tokens"]
        if passes.keep:
            passes.kept |= kept_sums(self.saved, range(done))
        if self.probes is not None:
            own = {name: held for name, held in streams.items() if name not in self._streams()}
            self.probes.streams |= {name.partition(" ")[2]: held for name, held in own.items()}
        passes.first = done
        return scores

    def keep(self, scores: dict[str, Tensor]) -> None:
        """Keep the block at hand, which is done."""
        passes, index = self.passes, self.passes.index
        if self.saved is None:
            return
        names = [site.name for site in passes.at if site.block == index]
        tensors = {f"score/{name}": scores[name] for name in names}
        errors = {}
        if self.probes is not None:
            tensors |= {f"curve/{name}": self.probes.curves[name] for name in names}
            errors = {name: self.probes.errors[name] for name in names}
        if passes.keep:
            for name in names:
                sums = passes.bank[name]
                tensors |= {f"{part}/{name}": getattr(sums, part) for part in PARTS}
        facts = {"tokens": passes.source["tokens"], "errors": errors}
        self.saved.put(f"{NAME}-{index}", tensors, facts)
        self.kept.keep(index + 1, passes.blocks, self._streams())

    def _numbers(self, name: str) -> Sequence[int] | None:
        """Return which hidden states of a stream this rank has."""
        if name == "text":
            return self.passes.numbers
        probed = self.probes is not None and name.partition(" ")[0] in ("probe", "probed")
        return self.probes.numbers if probed else None

    def _streams(self) -> dict[str, list[Held]]:
        streams = {"text": self.passes.hidden, **self.dense.streams()}
        if self.probes is not None:
            streams["probed"] = self.probes.dense.hidden
            streams |= {f"probe {name}": held for name, held in self.probes.streams.items()}
        return streams


def kept_sums(saved: Progress | None, blocks: range) -> dict[str, Moments]:
    """Return the moments of some blocks."""
    found: dict[str, dict[str, Tensor]] = {}
    for index in blocks if saved is not None else ():
        known = saved.need(f"{NAME}-{index}")
        for each in known.names():
            part, _, name = each.partition("/")
            if part in PARTS:
                found.setdefault(name, {})[part] = known.tensor(each)
    return {name: Moments(**parts) for name, parts in found.items()}
