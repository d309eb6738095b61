"""The first walk of a streamed job in its checkpoint: what each block has given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liar_ext.calibration.moments import Moments
from liar_ext.calibration.saved_sums import SUMS, packed, restored
from liar_ext.checkpoint_store import Checkpoint, reading
from liar_ext.data.hidden_states import Held
from liar_ext.reconstruction.saved_walk import SavedStreams
from liar_ext.streaming.judging import Judged
from liar_ext.streaming.passes import StreamedPasses
from liar_ext.streaming.probes import ProbeStreams


class FirstWalk:
    """Keeps scores, error curves and sums of the blocks that are done, and what walks along.

    Parameters
    ----------
    saved : Checkpoint, optional
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
        saved: Checkpoint | None,
        passes: StreamedPasses,
        probes: ProbeStreams | None,
        dense: Judged,
    ) -> None:
        self.saved, self.passes, self.probes, self.dense = saved, passes, probes, dense
        self.kept = SavedStreams(saved, SUMS, len(passes.blocks), self._numbers)

    def restore(self) -> dict[str, Tensor]:
        """Take all to where the hidden states are that were kept; return the scores up to there."""
        passes, scores, streams = self.passes, {}, self._streams()
        done = self.kept.restore(passes.blocks, streams, passes.states)
        for index in range(done):
            stored, facts = self.saved.need(f"{SUMS}-{index}")
            with reading(stored.path):
                for each in stored:
                    what, _, name = each.partition("/")
                    if what == "score":
                        scores[name] = stored[each]
                    elif what == "curve" and self.probes is not None:
                        self.probes.curves[name] = stored[each]
                if self.probes is not None:
                    self.probes.errors |= facts["errors"]
                passes.source["tokens"] = facts["tokens"]
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
            tensors |= packed({name: passes.bank[name] for name in names})
        facts = {"tokens": passes.source["tokens"], "errors": errors}
        self.saved.put(f"{SUMS}-{index}", tensors, facts)
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


def kept_sums(saved: Checkpoint | None, blocks: range) -> dict[str, Moments]:
    """Return the moments of some blocks."""
    found: dict[str, Moments] = {}
    for index in blocks if saved is not None else ():
        stored, _ = saved.need(f"{SUMS}-{index}")
        names = [name.removeprefix("total/") for name in stored if name.startswith("total/")]
        with reading(stored.path):
            found |= restored(stored, names)
    return found
