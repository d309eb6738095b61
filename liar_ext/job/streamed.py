"""Calibration with one block in memory: every text passes a block before the next is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import count_tokens, read_batches
from liar_ext.calibration.collect import Passes, check_not_padding, check_sums, counted, summing
from liar_ext.calibration.saved_sums import SUMS, bytes_of_sums, packed, restored
from liar_ext.calibration.taps import Moments, is_relative, tap_at
from liar_ext.checkpoint.saving import SHARD_BYTES
from liar_ext.job.estimate import bytes_by_blocks, room_for_states
from liar_ext.job.state import Job, Shares
from liar_ext.models.plan import Plan
from liar_ext.models.recipe import Recipe
from liar_ext.models.registry import family_of, type_of
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.models.slicing import apply_plan
from liar_ext.models.whole import held_by_experts, why_no_chain
from liar_ext.reconstruction.layerwise import Solved, check_block, solve_blocks
from liar_ext.reconstruction.solve import reconstruct_shared
from liar_ext.reconstruction.streams import SavedStreams, StreamedBatches, Streams, Walk
from liar_ext.selection.error_curves import probe_sites, probes_of, sensitivities_of
from liar_ext.selection.sensitivity import mean_divergences, pruned_site
from liar_ext.selection.whole_experts import KeptExperts, layers_of
from liar_ext.system.checkpoint_store import reading
from liar_ext.system.distributed import gather, rank, world_size
from liar_ext.system.errors import InputError
from liar_ext.system.progress import hiding_bars

SHARD_PART = 8  # a shard may take this part of the memory


def check_blocks(model: nn.Module, recipe: Recipe, blocks: int, *, certifies: bool) -> None:
    """Raise InputError for choices that need more than one of so many blocks at a time."""
    refused = [recipe.spelled(each) for each in recipe.without("streamed")]
    if certifies and recipe.schedule == "one-pass":
        refused.append("--certify with --schedule one-pass")
    if refused:
        raise InputError(
            f"prune: {refused[0]} needs the whole model in memory, and --max-memory says that "
            "it isn't; leave one of them out"
        )
    if reason := why_no_chain(model, blocks):
        raise InputError(
            f"prune: --max-memory can't read this {family_of(model).name!r} block by block: "
            f"{reason}; leave it out"
        )


def share_out(job: Job, keep_sums: bool | None = None) -> Job:
    """Share the limit of a job out; raise InputError if a block and its sums don't fit."""
    store, at, recipe, limit = job.walk.source, job.sites(job.model), job.recipe, job.limit
    given = store, at, list(read_batches(job.batches)), recipe
    shard = min(SHARD_BYTES, max(limit // SHARD_PART, store.block_bytes))
    need = bytes_by_blocks(*given) | {"a shard to be written": shard}
    if sum(need.values()) > limit:
        store.prefetch = False  # slower, but memory for one block less
        shard = store.block_bytes
        need = bytes_by_blocks(*given) | {"a shard to be written": shard}
    left, sums = room_for_states(need, limit), sum(bytes_of_sums(site.d_in) for site in at)
    if keep_sums is None:  # if they fit
        keep_sums = all(gather(recipe.schedule == "one-pass" and sums <= left // 2))
    states = max(0, left - (sums if keep_sums else 0))
    return replace(job, shares=Shares(need, shard, states, keep_sums))


def leave_out(walk: Walk, chosen: KeptExperts) -> None:
    """Remove experts from the model of a walk, also from blocks that are read later."""
    model, paths = walk.model, {module: path for path, module in walk.model.named_modules()}
    for site in layers_of(model):
        if site.team in chosen.plans:
            kept, scales = torch.tensor(chosen.plans[site.team].kept), chosen.scales[site.team][0]
            for each in held_by_experts(model, site):
                change = partial(each.without, kept=kept, scales=scales)
                walk.source.changes[f"{paths[each.owner]}.{each.name}"] = change
    apply_plan(model, Plan(type_of(model), "auto", {}, experts=chosen.plans))
    walk.refresh()


ALONG = "judged"  # the key of text that has passed the dense model


class StreamedPasses(Passes):
    """The moments of all sites, block by block: :class:`Passes` for a model that is not in memory.

    Iterating yields the sites of one block after the other, with its weights in memory and its
    moments as :attr:`bank`. With ``keep`` all sums are kept for a second walk. ``along`` and
    ``probes`` are other text that passes the blocks in the first walk; ``passed`` saves the former.
    """

    def __init__(self, job: Job, along: Sequence[StreamedBatches]) -> None:
        walk, self.recipe, self.keep = job.walk, job.recipe, job.shares.keep_sums
        self.walk, self.model, self.at = walk, walk.model, job.sites(walk.model)
        self.probes = ProbeStreams(job) if job.recipe.allocation == "curve" else None
        self.along, self.batches = along, list(read_batches(job.batches))
        numbers = range(rank(), len(self.batches), world_size())
        self.text = StreamedBatches("text", walk, [self.batches[n] for n in numbers], numbers)
        self.summed: list[int] = []  # numbers of the walks that ran the text
        for index, batch in enumerate(self.batches):
            check_not_padding(index, batch)
        source = {"model_type": type_of(self.model), "tokens": 0}
        self.bank = MomentBank(source=source | {"sequences": sum(map(len, self.batches))})
        self.index = self.first = 0  # of the block at hand, and of that to begin with
        self.kept: dict[str, Moments] = {}
        others = [] if self.probes is None else [self.probes.hidden, self.probes.dense.numbers]
        self._streams = SavedStreams(walk, SUMS, (self.text, *along), *others)
        self.passed = SavedStreams(walk, ALONG, along)  # behind the last block

    def __iter__(self) -> Iterator[list[Site]]:
        return self._groups(self.first)

    def _groups(self, first: int, known: bool = False) -> Iterator[list[Site]]:
        """Yield the groups from a block on, with sums that are ``known``, or anew."""
        if known or not first:
            self.text.hidden.clear()
        if not known:
            self.summed.append(len(self.summed) + 1)
        title = "from memory" if known else f"calibrate, walk {len(self.summed)}"
        for index in self.walk.through(title, first):
            self.index = index
            group = [site for site in self.at if site.block == index]
            self.bank.moments = {}  # memory of the last one is free now
            if known:
                self.bank.moments = {site.name: self.kept.pop(site.name) for site in group}
            else:
                if index and self.text.hidden:
                    check_block(self.walk, self.batches, index)
                self.bank.moments = self._sums(index, group)
                self.kept |= self.bank.moments if self.keep else {}
            yield group
        self.bank.moments = {}  # what comes after needs the memory

    def solve(self, plan: Plan, along: Sequence[StreamedBatches]) -> Iterator[Solved]:
        """Yield the blocks in a second walk, as :func:`solve_blocks` does, each in one pass."""
        if not self.keep:
            self.text.hidden.clear()

        def steps(done: int, _: Streams) -> Iterator[Solved]:
            if self.keep and not self.kept:  # the plan was known
                self._restore_sums(range(done, len(self.walk.blocks)))
            how = {"mode": self.recipe.reconstruct, "damp": self.recipe.damp}
            for group in self._groups(done, known=self.keep):
                with hiding_bars():
                    found = reconstruct_shared(self.model, self.bank, plan, group, **how)
                yield self.index, *found

        def streams() -> Streams:
            return {} if self.keep else {"text": self.text.hidden}

        kept = SavedStreams(self.walk, "pruning", along, streams, self.text.numbers)
        yield from solve_blocks(kept, steps)

    def _sums(self, index: int, group: Sequence[Site]) -> dict[str, Moments]:
        taps = [tap_at(self.model, site) for site in group]
        with summing(self.model, taps) as (moments, current):
            self.text.advance(index, current.set)
        _, routed = counted(current)
        source = self.bank.source
        check_sums(moments, source["sequences"], routed)
        if routed:
            source["routed"] = source.get("routed", {}) | routed
        if group:
            # All sites see all tokens, but for rows that are not finite: those of the first count.
            tokens = int(moments[group[0].name].tokens.sum())
            if is_relative(group[0]) or group[0].expert is not None:
                tokens = sum(map(count_tokens, self.batches))
            source["tokens"] = source["tokens"] or tokens
        return moments

    def restore(self, found: Mapping[str, dict]) -> None:
        """Go on with the first walk where it was saved; fill ``found`` as :meth:`finish` has it."""
        saved, (done, streams) = self.walk.saved, self._streams.restore()
        for index in range(done):
            stored, facts = saved.need(f"{SUMS}-{index}")
            with reading(stored.path):
                for what, values in found.items():
                    values |= facts.get(what, {})
                    names = [name for name in stored if name.startswith(f"{what}/")]
                    values |= {name.removeprefix(f"{what}/"): stored[name] for name in names}
                self.bank.source["tokens"] = facts["tokens"]
                if "routed" in facts:
                    self.bank.source["routed"] = facts["routed"]
        if self.keep:
            self._restore_sums(range(done))
        if self.probes is not None:
            self.probes.restore(streams)
        self.first = done

    def finish(self, found: Mapping[str, dict]) -> None:
        """Take all other text past the block at hand; save tensors or numbers that were found."""
        for each in self.along:
            each.advance(self.index)
        saved, names = self.walk.saved, [site.name for site in self.at if site.block == self.index]
        if saved is None:
            return
        tensors, source = {}, self.bank.source
        facts = {name: source[name] for name in ("tokens", "routed") if name in source}
        for what, values in found.items():
            here = {name: values[name] for name in names if name in values}
            if all(isinstance(value, Tensor) for value in here.values()):
                tensors |= {f"{what}/{name}": value for name, value in here.items()}
            else:
                facts[what] = here
        if self.keep:
            tensors |= packed({name: self.bank[name] for name in names})
        done = self.index + 1
        saved.put(f"{SUMS}-{self.index}", tensors, facts)
        self._streams.keep(done)
        if done == len(self.walk.blocks):
            self.passed.keep(done, now=True)

    def _restore_sums(self, blocks: range) -> None:
        for index in blocks if self.walk.saved is not None else ():
            stored, _ = self.walk.saved.need(f"{SUMS}-{index}")
            names = [name.removesuffix(".gram") for name in stored if name.endswith(".gram")]
            with reading(stored.path):
                self.kept |= {name: restored(stored.__getitem__, name) for name in names}


PROBE = "probe "  # and the name of its site: the name of a stream


class ProbeStreams:
    """Sensitivities block by block, as :func:`liar_ext.selection.sensitivity.site_divergences`.

    A probe begins at the block whose site it prunes, on the dense model's hidden states, and passes
    the later blocks as they are. Ranks take batches of probe sequences in turn.
    """

    def __init__(self, job: Job) -> None:
        walk, self.budget, self.mode = job.walk, job.recipe.budget, job.recipe.reconstruct
        self.walk, every = walk, list(read_batches(probes_of(walk.model, job.batches)))
        numbers = range(rank(), len(every), world_size())
        self.dense = StreamedBatches("probed", walk, [every[n] for n in numbers], numbers)
        self.streams: dict[str, StreamedBatches] = {}  # of each probe that has begun
        self.errors: dict[str, float] = {}  # of each site
        teams = teams_of(sites(walk.model)).items()
        self.teams = {name: [site.name for site in team] for name, team in teams}  # of each probe

    def hidden(self) -> Streams:
        """Return the hidden states of the dense model and of all probes."""
        return {each.name: each.hidden for each in (self.dense, *self.streams.values())}

    def restore(self, streams: Streams) -> None:
        """Restore the probes that have begun from saved hidden states."""
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
            model = self.walk.model
            here = probe_sites(model, bank, group, scores, curves, self.budget, mode=self.mode)
            for name, team in teams_of(group).items():  # the experts of a layer together
                some = [site for site in team if here.plan.sites[site.name].removed]
                with ExitStack() as pruned:
                    for site in some:
                        weights = here.weights[site.name]
                        pruned.enter_context(pruned_site(model, site, here.plan, weights))
                    if some:
                        self.streams[name] = self.dense.branch(PROBE + name, index)
            self.errors |= here.errors
        self.dense.advance(index)

    def sensitivities(self) -> dict[str, float]:
        """Return the sensitivity of each site, after the last block."""
        own = dict(zip(self.dense.numbers, self.dense.batches, strict=True))
        probes = {name: stream.answering_for for name, stream in self.streams.items()}
        with self.walk.begun(), self.walk.source.head():
            values = mean_divergences(self.walk.model, own, self.dense.answering_for, probes)
        measured = dict.fromkeys(self.errors, 0.0)
        for name, value in values.items():
            measured |= dict.fromkeys(self.teams[name], value)
        return sensitivities_of(self.errors, measured)
