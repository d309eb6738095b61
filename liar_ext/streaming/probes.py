"""Sensitivities with one block in memory: every probe is a stream of its own that walks along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from liar_ext.calibration.moments import MomentBank
from liar_ext.data.batches import Batches, read_batches
from liar_ext.distributed import gather, rank, world_size
from liar_ext.models.sites import Site
from liar_ext.plan import Budget
from liar_ext.reconstruction.saved_walk import Streams
from liar_ext.reconstruction.streams import StreamedBatches, Walk
from liar_ext.selection.curve_allocation import probe_sites, probes_of, sensitivities_of
from liar_ext.selection.divergence import DenseOutputs
from liar_ext.selection.sensitivity import POSITIONS, mean_divergences, pruned_site

PROBE = "probe "  # and the name of its site: the name of a stream


class ProbeStreams:
    """What :func:`liar_ext.selection.curve_allocation.measure_sensitivities` does, block by block.

    A probe begins at the block whose site it prunes, on the dense model's hidden states, and passes
    the later blocks as they are; so the weights are read once for all probes. What a probe has at a
    time are the hidden states of the few probe sequences, of which ranks take a batch each in turn.

    ``batches`` are the calibration set, of which
    :func:`liar_ext.selection.curve_allocation.probes_of` takes a few sequences. The budget tells
    how much of a site a probe prunes, the mode how it is reconstructed then.
    """

    def __init__(self, walk: Walk, batches: Batches, budget: Budget, mode: str) -> None:
        self.walk, self.budget, self.mode = walk, budget, mode
        every = list(read_batches(probes_of(walk.model, batches)))
        numbers = range(rank(), len(every), world_size())
        self.dense = StreamedBatches("probed", walk, [every[n] for n in numbers], numbers)
        self.streams: dict[str, StreamedBatches] = {}  # of each probe that has begun
        self.errors: dict[str, float] = {}  # of each probe

    def every(self) -> list[StreamedBatches]:
        """Return all that passes the blocks."""
        return [self.dense, *self.streams.values()]

    def restore(self, streams: Streams) -> None:
        """Take the probes that have begun from saved hidden states."""
        for name, hidden in streams.items():
            if name.startswith(PROBE):
                given = name, self.walk, self.dense.batches, self.dense.numbers, hidden
                self.streams[name.removeprefix(PROBE)] = StreamedBatches(*given)

    def step(
        self,
        index: int,
        bank: MomentBank,
        group: Sequence[Site],
        scores: Mapping[str, Tensor],
        curves: Mapping[str, Tensor],
    ) -> None:
        """Take all probes past the block at hand, and begin those of its sites."""
        for each in self.streams.values():
            each.advance(index)
        if group:
            given = self.walk.model, bank, group, scores, curves, self.budget
            here = probe_sites(*given, mode=self.mode)
            for site in group:
                if here.plan.sites[site.name].removed:
                    weights = here.weights[site.name]
                    with pruned_site(self.walk.model, site, here.plan, weights):
                        self.streams[site.name] = self.dense.branch(PROBE + site.name, index)
            self.errors |= here.errors
        self.dense.advance(index)

    def sensitivities(self) -> dict[str, float]:
        """Return the sensitivity of each site, after the last block."""
        model, blocks, last = self.walk.model, self.walk.blocks, len(self.walk.blocks) - 1
        total, rows = dict.fromkeys(self.streams, 0.0), 0
        with self.walk.begun(), self.walk.source.head():
            for number, batch in enumerate(self.dense.batches):
                with blocks.answering({last: partial(self.dense.at, number)}):
                    dense = DenseOutputs(model, batch, POSITIONS)
                rows += len(dense)
                for name, stream in self.streams.items():
                    with blocks.answering({last: partial(stream.at, number)}):
                        total[name] += dense.divergence(model, finite_only=True)
        totals, rows = zip(*gather((list(total.values()), rows)), strict=True)
        summed = [sum(of_ranks) for of_ranks in zip(*totals, strict=True)]
        values = mean_divergences(summed, sum(rows), [(name,) for name in total])
        measured = dict(zip(total, values, strict=True))
        return sensitivities_of(self.errors, dict.fromkeys(self.errors, 0.0) | measured)
