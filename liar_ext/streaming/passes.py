"""Calibration as a walk over the blocks: every sequence passes a block before the next is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from liar_ext.bars import Bar, spare
from liar_ext.calibration.collect import check_sums
from liar_ext.calibration.hooks import watched
from liar_ext.calibration.moments import MomentBank, Moments
from liar_ext.calibration.taps import InFlight, adding, is_relative, tap_at
from liar_ext.data.batches import Batches, count_tokens, read_batches
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.distributed import all_reduce, rank, world_size
from liar_ext.errors import InputError
from liar_ext.models.running import evaluating
from liar_ext.models.sites import Site, sites
from liar_ext.reconstruction.block_runner import Blocks
from liar_ext.streaming.block_store import BlockStore


class StreamedPasses:
    """The moments of all sites, block by block: what :class:`Passes` is for a model in memory.

    Iterating gives the sites of one block after the other, with the weights of that block in memory
    and its moments at hand as :attr:`bank`; the sums are those of one pass of the whole model.

    Parameters
    ----------
    store : BlockStore
        The dense model.
    batches : iterable of mapping
        The calibration set.
    at : sequence of Site
        Sites to collect.
    states : HiddenStates
        Where hidden states are held.
    keep : bool
        Keep all sums, so that going through the blocks again takes no forward pass.
    progress : bool
        Show a progress bar.

    Attributes
    ----------
    hidden : list of Held
        By batch of this rank, the hidden states after the block that was given last.
    first : int
        The block to begin with next; ``hidden``, or the sums in ``kept``, are those of there on.
    summed : list of int
        Numbers of the walks that ran the text.
    numbers : range
        Of the batches that this rank takes past the blocks.
    mine : list of Batch
        These.
    """

    def __init__(
        self,
        store: BlockStore,
        batches: Batches,
        at: Sequence[Site],
        states: HiddenStates,
        *,
        keep: bool = False,
        progress: bool = False,
    ) -> None:
        self.store, self.model, self.states = store, store.model, states
        self.at, self.keep, self.progress = list(at), keep, progress
        self.batches = list(read_batches(batches))
        self.numbers = range(rank(), len(self.batches), world_size())
        self.mine = [self.batches[number] for number in self.numbers]
        self.summed: list[int] = []
        self.source = self._source()
        self.bank = MomentBank({}, self.source)
        self.blocks = Blocks(self.model, sites(self.model))
        self.index = 0  # of the block that is given
        self.first, self.hidden = 0, []
        self.kept: dict[str, Moments] = {}

    @property
    def taken(self) -> int:
        """How many walks ran the text."""
        return len(self.summed)

    def __iter__(self) -> Iterator[list[Site]]:
        return self._walk(known=False)

    def back(self) -> Iterator[list[Site]]:
        """Return the groups once more, from the sums where they were kept."""
        return self._walk(known=self.keep)

    def _walk(self, known: bool) -> Iterator[list[Site]]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self.blocks.opened())
            first, self.first = self.first, 0
            if known or not first:
                self.hidden[:] = [] if known else self._enter()
            if not known:
                self.summed.append(len(self.summed) + 1)
            title = "from memory" if known else f"calibrate, walk {self.taken}"
            spare(title, first)
            steps, every = range(first, len(self.blocks)), len(self.blocks)
            bar = {"initial": first, "total": every, "disable": not self.progress}
            for index in Bar(steps, desc=title, **bar):
                self.index = index
                group = [site for site in self.at if site.block == index]
                with self.store.block(index):
                    self._check_chain(index)
                    self.bank = MomentBank({}, self.source)  # memory of the last one is free now
                    if known:
                        self.bank.moments = {site.name: self.kept.pop(site.name) for site in group}
                    else:
                        self.bank.moments = self._sums(index, group)
                    if self.keep and not known:
                        self.kept |= self.bank.moments
                    yield group
            self.bank = MomentBank({}, self.source)  # what comes after needs the memory

    def _enter(self) -> list[Held]:
        """Return the hidden states of this rank's batches before the first block."""
        device = self.store.device
        entered = (self.blocks.enter(0, batch.to(device).inputs)[0][0] for batch in self.mine)
        return [self.states.hold(hidden) for hidden in entered]

    def _check_chain(self, index: int) -> None:
        """Raise InputError if anything is done to the stream between two blocks.

        With all blocks before it passing on what they are given, a block is given what the first
        one is, unless something comes between.
        """
        if index == 0 or not self.hidden:
            return
        one = self.batches[0].select([0]).to(self.store.device).inputs
        first, here = (self.blocks.enter(at, one)[0][0] for at in (0, index))
        if not torch.equal(first, here):
            raise InputError(
                f"prune: --max-memory is for blocks that read what the one before wrote, and "
                f"{type(self.model).__name__} changes it before block {index}; leave it out"
            )

    def _sums(self, index: int, group: Sequence[Site]) -> dict[str, Moments]:
        """Take all sequences past a block, and return the moments of its sites."""
        device, current = self.store.device, InFlight()
        moments = {site.name: Moments.zeros(site.d_in, device=device) for site in group}
        with ExitStack() as stack:
            for site in group:
                given = tap_at(self.model, site), moments[site.name], current
                consumer = self.model.get_submodule(site.consumer)
                stack.enter_context(watched(consumer, adding(*given, math.inf)))
            for batch, held in zip(self.mine, self.hidden, strict=True):
                batch = batch.to(device)
                current.set(batch)
                held.set(self.blocks.run(index, batch.inputs, held.get().to(device)).output)
        for sums in moments.values():
            all_reduce(*vars(sums).values())
        check_sums(MomentBank(moments), self.source["sequences"])
        if group:
            # All sites see all tokens, but for rows that are not finite: those of the first count.
            tokens = int(moments[group[0].name].tokens.sum())
            if is_relative(group[0]):
                tokens = sum(map(count_tokens, self.batches))
            self.source["tokens"] = self.source["tokens"] or tokens
        return moments

    def _source(self) -> dict[str, object]:
        """Return what the report says of the calibration set."""
        for index, batch in enumerate(self.batches):
            if batch.mask is not None and not batch.mask.any():
                raise InputError(f"calibrate: batch {index} holds only padding; leave it out")
        return {
            "model_type": self.model.config.model_type,
            "sequences": sum(map(len, self.batches)),
            "tokens": 0,
        }
