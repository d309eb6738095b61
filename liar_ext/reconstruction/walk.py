"""A walk over the blocks of a model: two streams, and one solve per site on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count, takewhile

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch, Batches, completed, read_batches
from liar_ext.models.plan import Plan
from liar_ext.models.running import device_of
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight
from liar_ext.reconstruction.block_runner import Forward, Run, counted, layer_forward, rows_of
from liar_ext.reconstruction.ridge import LayerSums, Tokens, form_at, form_of_expert
from liar_ext.reconstruction.solve import SiteRow, Solution, error_on, solve
from liar_ext.reconstruction.streams import Held, Part, Streams, Walk, Weights
from liar_ext.system.distributed import (
    all_reduce,
    broadcast,
    gather,
    is_first,
    rank,
    share,
    world_size,
)
from liar_ext.system.errors import InputError, naming_memory

STREAMS, BEHIND = ("dense", "pruned"), " behind "


class LayerwiseSolver:
    """A walk over the blocks with a fixed plan: :meth:`start` once, :meth:`step` per block.

    Blocks that are ``gone`` are run in the dense model alone: the last layer before a gap is solved
    for the stream behind it, and every site of the plan is solved, be all its units kept. Errors
    are then relative to those with the dense weight.

    Rank r of n holds the hidden states of batches r, r + n, ... Sums are all-reduced, and the sites
    of a layer are shared.
    """

    def __init__(
        self, walk: Walk, plan: Plan, mode: str, damp: float | str, gone: Collection[int] = ()
    ) -> None:
        self.model, self.blocks, self.states = walk.model, walk.blocks, walk.states
        self.plan, self.mode, self.damp, self.gone = plan, mode, damp, gone
        at = [i for i, block in enumerate(self.blocks.layers) if self._planned(block)]
        self.first = min(at, default=0)  # block of the plan; both streams are one before it
        self.device = device_of(walk.model)
        self.text: list[Part] = []  # what this rank has of the calibration text
        self.fresh: list[Part] = []  # and of fresh text
        self.certifies = False  # whether any rank has fresh text
        self.targets: dict[str, str] = {}  # by layer of the block in work
        self.consumers: dict[str, Forward] = {}  # those of its layers that are solved
        self.ends: set[str] = set()  # layers whose norm gives what their block does
        self.weights: Weights = {}
        self.rows: dict[str, SiteRow] = {}

    def start(self, batches: Batches, fresh: Batches = ()) -> None:
        """Split the batches by fold, and take all hidden states to the first block."""
        folds, numbers = set(), count()
        for index, batch in enumerate(read_batches(batches)):
            folds |= set(batch.fold.tolist())
            mine = index % world_size() == rank()
            batch = completed(self.model, batch) if mine else batch
            for fold in range(FOLDS):
                rows, number = (batch.fold == fold).nonzero().flatten(), next(numbers)
                if len(rows) and mine:
                    self.text.append(self._entered(batch.select(rows), fold, number))
        if folds != set(range(FOLDS)):
            raise InputError("layerwise: both folds need text; give at least 2 sequences")
        for index, batch in enumerate(read_batches(fresh)):
            self.certifies, number = True, next(numbers)
            if index % world_size() == rank():
                self.fresh.append(self._entered(completed(self.model, batch), None, number))

    def _planned(self, layers: Mapping[str, Sequence[Site]]) -> list[str]:
        return [name for name, layer in layers.items() if layer[0].name in self.plan.sites]

    @property
    def parts(self) -> list[Part]:
        """All that this rank has."""
        return [*self.text, *self.fresh]

    def _entered(self, batch: Batch, fold: int | None, number: int) -> Part:
        first = self._first(0, batch)
        return Part(batch, fold, number, {name: self.states.hold(first) for name in STREAMS})

    def _first(self, index: int, batch: Batch) -> Tensor:
        """Return the hidden states that the stack beginning at a block reads."""
        return self.blocks.enter(index, batch.to(self.device).inputs)[0][0]

    def _next_stack(self, index: int) -> None:
        """Go on to the stack of blocks that begins at ``index``."""
        read = self.blocks.read_later(index - 1)
        for part in self.parts:
            hidden = self._first(index, part.batch)
            for name in STREAMS:
                if read:
                    part.states[f"{name}{BEHIND}{index - 1}"] = part.states[name]
                part.states[name] = self.states.hold(hidden)

    def step(self, index: int) -> None:
        """Solve the sites of block ``index``, and take both streams past it."""
        if index in self.gone:
            return
        if index > 0 and self.blocks.begins(index):
            self._next_stack(index)
        layers, self.targets = self.blocks.layers[index], {}
        planned = self._planned(layers)
        for part in self.parts:
            part.goals = {}
        self._pass(index, {name: name for name in planned})
        for beyond in takewhile(self.gone.__contains__, range(index + 1, len(self.blocks))):
            (*_, end), (*_, last) = self.blocks.layers[beyond], layers
            self._pass(beyond, {end: last} if last in planned else {})
        for name in planned:
            layer = layers[name]
            whole = all(len(self.plan.sites[at.name].kept) == at.units for at in layer)
            if whole and not self.gone:
                self._keep(layer)
            else:
                with naming_memory(f"reconstruct: out of memory in the solve of {name}"):
                    self.consumers[name] = self._solve(layer)
        for part in self.parts:
            alike = index < self.first
            after = part.states["dense"].get() if alike else self._after(index, part)
            part.states["pruned"].set(after)
        self.consumers = {}

    def take(self) -> tuple[Weights, dict[str, SiteRow]]:
        """Hand over the weights and rows of the block that was solved last."""
        found = self.weights, self.rows
        self.weights, self.rows = {}, {}
        return found

    def streams(self) -> Streams:
        """Return the hidden states of both streams, by part."""
        names = self.parts[0].states if self.parts else STREAMS
        return {name: [part.states[name] for part in self.parts] for name in names}

    def resume(self, streams: Mapping[str, list[Held]]) -> None:
        """Take what lies behind the streams from :meth:`streams` of a walk that was further."""
        for name in (name for name in streams if BEHIND in name):
            for part, held in zip(self.parts, streams[name], strict=True):
                part.states[name] = held

    def _pass(self, index: int, goals: Mapping[str, str]) -> None:
        """Take the dense stream past a block, and note what it is at some layers.

        ``goals`` are these layers, each with the one that is solved for what is there.
        """
        layers = self.blocks.layers[index]
        self.targets |= {name: self._target_at(layer[0]) for name, layer in layers.items()}
        for part in self.parts:
            run = self._run(index, part, "dense")
            for name, into in goals.items():
                if name == into or self.targets[name] == self.targets[into] == "stream":
                    part.goals[into] = self.states.hold(self._reached(layers[name][0], run))
            part.states["dense"] = self.states.hold(run.output)
            del run  # before the next one is there

    def _after(self, index: int, part: Part) -> Tensor:
        """Return the pruned stream after a block whose sites are solved."""
        if part.halfway is None:
            return self._run(index, part, "pruned").output
        (stream, x), part.halfway = (held.get() for held in part.halfway), None
        layers = self.blocks.layers[index].items()
        (mlp,) = (name for name, layer in layers if layer[0].kind == "mlp")
        device = self.blocks.device(index)
        after = stream + self.consumers[mlp](x.to(device)).cpu().view_as(stream)
        norm = self.blocks.norms.get(mlp)
        return after if norm is None else self.model.get_submodule(norm)(after.to(device)).detach()

    def _solve(self, layer: Sequence[Site]) -> Forward:
        """Solve the sites of a layer, and return what takes its consumer's place."""
        start, new, target = time.perf_counter(), {}, self.targets[layer[0].team]
        found = self._collect(self.text, layer)
        sums = {site.name: each for site, each in zip(layer, found, strict=True)}
        found = share(layer, lambda mine: {s.name: self._solution(s, sums[s.name]) for s in mine})
        fresh = [None] * len(layer)
        if self.certifies:
            fresh = self._collect(self.fresh, layer)
        seconds = (time.perf_counter() - start) / len(layer)
        for site, unseen in zip(layer, fresh, strict=True):
            solution, each = Solution(**found[site.name]), sums[site.name]
            if self.gone:
                solution = self._by_what_is_missing(site, solution, each)
            if target == "branch":
                path = f"{solution.path}; branch, as the stream is not a plain sum here"
                solution = replace(solution, path=path)
            self._store(
                site,
                solution,
                target=target,
                dropped_rows=each.moments.dropped_rows,
                seconds=seconds,
                certified_error=None if unseen is None else self._error(site, solution, unseen),
                tokens=None if site.expert is None else each.rows,
            )
            new[site.name] = self._consumer(site, solution)
        return layer_forward(self.model, layer, new)

    def _keep(self, layer: Sequence[Site]) -> None:
        """Note that a layer loses nothing and keeps the weights that it has."""
        facts = {"dropped_rows": 0, "seconds": 0.0}
        for site in layer:
            weight = get_consumer_weight(self.model, site).double()
            solution = Solution(weight, None, math.inf, 0.0, 0.0, 1.0, "kept as it is")
            self._store(site, solution, certified_error=0.0 if self.certifies else None, **facts)

    def _store(self, site: Site, solution: Solution, **facts: object) -> None:
        self.weights[site.name] = (solution.weight, solution.bias)
        units = site.units, len(self.plan.sites[site.name].kept), site.unit_params
        self.rows[site.name] = solution.row(site.name, *units, **facts)

    def _collect(self, parts: Sequence[Part], layer: Sequence[Site]) -> list[LayerSums]:
        """Return the sums of all ranks; those of fresh text are in fold 0."""
        device = self.blocks.device(self.blocks.index_of(layer[0]))
        sums = [LayerSums.zeros(site, device) for site in layer]
        for part in parts:
            for each, rows in zip(sums, self._read(layer, part), strict=True):
                each.add(rows, part.fold or 0)
        counts = gather([each.rows for each in sums])
        for each, rows in zip(sums, zip(*counts, strict=True), strict=True):
            all_reduce(*vars(each.moments).values(), *vars(each.residual).values())
            each.rows = sum(rows)
        return sums

    def _solution(self, site: Site, sums: LayerSums) -> dict[str, object]:
        """Return the fields of the solution of a site, which ranks can exchange."""
        weight, bias = self._given(site)
        planned = self.plan.sites[site.name]
        mode = form_at(self.mode, bias is not None or planned.bias, gains_bias=False)
        if site.expert is not None:
            mode = form_of_expert(mode, bias is not None, sums.moments)
        settings = {"target": sums.residual, "step": (0.0, 1.0), "mode": mode, "damp": self.damp}
        return vars(solve(weight, bias, sums.moments, site.features(planned.kept), **settings))

    def _error(self, site: Site, solution: Solution, fresh: LayerSums) -> float:
        new = solution.weight, solution.bias
        return error_on(self.model, site, self.plan, new, fresh.moments, fresh.residual)

    def _by_what_is_missing(self, site: Site, solution: Solution, sums: LayerSums) -> Solution:
        """Return a solution whose errors are relative to those of the dense weight."""
        dense = replace(solution, weight=get_consumer_weight(self.model, site), bias=None)
        scale = self._error(site, dense, sums) or math.inf
        errors = solution.error / scale, solution.holdout_error / scale
        return replace(solution, error=errors[0], holdout_error=errors[1])

    def _consumer(self, site: Site, solution: Solution) -> Forward:
        """Return the new consumer of a site, as a function of all its features."""
        weight, bias = self._given(site)
        features = site.features(self.plan.sites[site.name].kept).to(weight.device)
        new = solution.weight.to(weight.dtype)
        new_bias = bias if solution.bias is None else solution.bias.to(weight.dtype)
        return lambda x: nn.functional.linear(x[..., features], new, new_bias)

    def _given(self, site: Site) -> tuple[Tensor, Tensor | None]:
        return get_consumer_weight(self.model, site), get_consumer_bias(self.model, site)

    def _read(self, layer: Sequence[Site], part: Part) -> list[Tokens]:
        """Return what the consumers of a layer read of a part, and the residual.

        That is what the dense model has there, less what the pruned one has with the dense weight.
        """
        site, name = layer[0], layer[0].team
        # Only the stream after an MLP needs the block run to its end, if no norm reads it before.
        late = site.kind == "mlp" and name not in self.blocks.norms
        end = None if self.targets[name] == "stream" and late else name
        run = self._run(self.blocks.index_of(site), part, "pruned", end)
        read, output = run.seen[name]
        r = part.goals[name].get() - self._reached(site, run)
        part.halfway = self._halfway(site, run)
        r = r.to(output.device).flatten(0, -2)
        used = counted(part.batch, site, len(r), output, run.sums.get(name))
        return list(rows_of(self.model, layer, read, r, used))

    def _halfway(self, site: Site, run: Run) -> tuple[Held, Held] | None:
        """Return what :class:`Part` keeps of a run, if no more than a sum or its norm follows."""
        here = self.blocks.layers[self.blocks.index_of(site)]
        mlps = [name for name, layer in here.items() if layer[0].kind == "mlp"]
        if mlps != [site.name] or len(here) == 1:
            return None
        x, added = run.seen[site.name]
        plain = all(self.targets.get(name) == "stream" for name in here)
        if site.name in self.ends:
            stream = run.sums[site.name] - added.view_as(run.before)
        elif plain and self.blocks.norms.keys().isdisjoint(here):
            stream = self.blocks.after_attention(site, run.before, run, itself=False)
        else:
            return None
        return self.states.hold(stream), self.states.hold(x)

    def _target_at(self, site: Site) -> str:
        """Return the target that the block allows: "stream" where it adds plainly, or "branch".

        Also "stream" where a norm reads the sum; note which one, and whether it ends the block.
        """
        found, index = None, self.blocks.index_of(site)
        if is_first():
            part = self.parts[0]
            one = part.batch.select([0]).to(self.device).inputs
            hidden = part.states["dense"].get()[:1].to(self.blocks.device(index))
            with self._behind(part, "dense", 1):
                plain = self.blocks.adds_plainly(site, one, hidden)
                norm = (None, False) if plain else self.blocks.norm_of_sum(site, one, hidden)
            found = plain, *norm
        plain, norm, ends = broadcast(found)
        if norm is not None:
            self.blocks.norms[site.team] = norm
        if ends:
            self.ends.add(site.team)
        return "stream" if plain or norm is not None else "branch"

    def _run(self, index: int, part: Part, name: str, end: str | None = None) -> Run:
        consumers = self.consumers if name == "pruned" else None
        inputs = part.batch.to(self.device).inputs
        hidden = part.states[name].get().to(self.blocks.device(index))
        with self._behind(part, name):
            return self.blocks.run(index, inputs, hidden, consumers, end)

    def _behind(self, part: Part, name: str, most: int | None = None) -> AbstractContextManager:
        """Let stacks of a part that are done answer with their states, of the first sequences."""
        start, answers = f"{name}{BEHIND}", {}
        for key, held in part.states.items():
            if key.startswith(start):
                answers[int(key.removeprefix(start))] = lambda held=held: held.get()[:most]
        return self.blocks.answering(answers)

    def _reached(self, site: Site, run: Run) -> Tensor:
        """Return the consumer's output, or the stream after the site, on the CPU.

        Where a norm follows the sum, the stream is what that reads. In float32, or float64 as the
        model is: the difference of two of these is the residual.
        """
        if self.targets[site.team] == "branch":
            found = run.seen[site.team][1].view_as(run.before)
        elif site.team in run.sums:
            found = run.sums[site.team].view_as(run.before)
        elif site.kind == "mlp":
            found = run.output
        else:
            return self.blocks.after_attention(site, _wide(run.before), run)
        return _wide(found)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))
