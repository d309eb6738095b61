"""Sensitivities with one block in memory: every probe is a stream of its own that walks along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from liar_ext.data.batches import Batches, read_batches
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.distributed import gather, rank, share, world_size
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site
from liar_ext.plan import Budget
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.selection.curve_allocation import probe_sites, probes_of, sensitivities_of
from liar_ext.selection.divergence import DenseOutputs
from liar_ext.selection.error_curves import error_curves
from liar_ext.selection.sensitivity import POSITIONS, mean_divergences, pruned_site
from liar_ext.streaming.block_store import BlockStore
from liar_ext.streaming.passes import StreamedPasses
from liar_ext.streaming.trace import Trace


class ProbeStreams:
    """What :func:`liar_ext.selection.curve_allocation.measure_losses` measures, block by block.

    A probe begins at the block whose site it prunes, on the dense model's hidden states, and passes
    the later blocks as they are; so the weights are read once for all probes. What a probe has at a
    time are the hidden states of the few probe sequences, of which ranks take a batch each in turn.

    Parameters
    ----------
    store : BlockStore
        The dense model.
    batches : iterable of mapping
        The calibration set, of which
        :func:`liar_ext.selection.curve_allocation.probes_of` takes a few sequences.
    budget : Budget
        Which tells how much of a site a probe prunes.
    mode : str
        How it is reconstructed then.
    states : HiddenStates
        Where hidden states are held.
    """

    def __init__(
        self, store: BlockStore, batches: Batches, budget: Budget, mode: str, states: HiddenStates
    ) -> None:
        self.store, self.model, self.states = store, store.model, states
        self.budget, self.mode = budget, mode
        every = list(read_batches(probes_of(store.model, batches)))
        self.numbers = range(rank(), len(every), world_size())
        self.batches = [every[number] for number in self.numbers]
        self.errors: dict[str, float] = {}  # of each probe
        self.curves: dict[str, Tensor] = {}  # of each site
        self.elsewhere: dict[str, str] = {}  # curves that found no memory
        self.dense = Trace(store, self.batches, states)
        self.streams: dict[str, list[Held]] = {}  # of each probe that has begun, by batch

    def step(
        self, passes: StreamedPasses, group: Sequence[Site], scores: Mapping[str, Tensor]
    ) -> None:
        """Take all probes past the block at hand, and begin those of its sites."""
        blocks, index = passes.blocks, passes.index
        self.dense.begin(blocks)
        for streams in self.streams.values():
            self._advance(blocks, index, streams, streams)
        if group:
            self._begin(passes, group, scores)
        self.dense.advance(blocks, index)

    def _begin(
        self, passes: StreamedPasses, group: Sequence[Site], scores: Mapping[str, Tensor]
    ) -> None:
        """Begin the probes of sites of the block at hand."""
        given, told = (self.model, passes.bank), {"elsewhere": self.elsewhere}
        curves = share(group, lambda mine: error_curves(*given, mine, scores, **told))
        here = probe_sites(*given, group, scores, curves, self.budget, mode=self.mode)
        for site in group:
            if here.plan.sites[site.name].removed:
                with pruned_site(self.model, site, here.plan, here.weights[site.name]):
                    begun = self._advance(passes.blocks, passes.index, self.dense.hidden)
                    self.streams[site.name] = begun
        self.errors |= here.errors
        self.curves |= curves

    def losses(self, blocks: Blocks) -> dict[str, tuple[Tensor, float]]:
        """Return loss and sensitivity of each site, after the last block."""
        total, rows = dict.fromkeys(self.streams, 0.0), 0
        with torch.no_grad(), evaluating(self.model), blocks.opened(), self.store.head():
            for number, batch in enumerate(self.batches):
                last, dense_end = len(blocks) - 1, partial(self._at, self.dense.hidden, number)
                with blocks.answering({last: dense_end}):
                    dense = DenseOutputs(self.model, batch, POSITIONS)
                rows += len(dense)
                for name, streams in self.streams.items():
                    with blocks.answering({last: partial(self._at, streams, number)}):
                        total[name] += dense.divergence(self.model, finite_only=True)
        totals, rows = zip(*gather((list(total.values()), rows)), strict=True)
        summed = [sum(of_ranks) for of_ranks in zip(*totals, strict=True)]
        values = mean_divergences(summed, sum(rows), [(name,) for name in total])
        measured = dict(zip(total, values, strict=True))
        found = sensitivities_of(self.errors, dict.fromkeys(self.errors, 0.0) | measured)
        return {name: (found[name] * curve, found[name]) for name, curve in self.curves.items()}

    def _at(self, streams: Sequence[Held], number: int) -> Tensor:
        return streams[number].get().to(self.store.device)

    def _advance(
        self,
        blocks: Blocks,
        index: int,
        streams: Sequence[Held],
        into: Sequence[Held] | None = None,
    ) -> Sequence[Held]:
        """Run the block on every batch of a stream; hold what comes out, or set it in ``into``."""
        new = []
        for number, batch in enumerate(self.batches):
            inputs = batch.to(self.store.device).inputs
            output = blocks.run(index, inputs, self._at(streams, number)).output
            if into is None:
                new.append(self.states.hold(output))
            else:
                into[number].set(output)
        return new if into is None else into
