"""A walk over the blocks of a model: two streams, and one solve per site on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Batch, Batches, read_batches
from liar_ext.calibration.hidden_states import Held, HiddenStates
from liar_ext.distributed import all_reduce, broadcast, gather, is_first, rank, share, world_size
from liar_ext.errors import InputError, solving
from liar_ext.models.running import device_of
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight
from liar_ext.plan import Plan
from liar_ext.reconstruction.block_runner import Blocks, Run
from liar_ext.reconstruction.one_pass import (
    Forward,
    LayerSums,
    Rows,
    counted,
    layer_forward,
    rows_of,
)
from liar_ext.reconstruction.ridge import Solution, form_of_expert
from liar_ext.reconstruction.solve import error_on, report_row, solve
from liar_ext.reconstruction.streams import Part, Stream, with_inputs
from liar_ext.rows import SiteRow

STREAMS, BEHIND = ("dense", "pruned"), " behind "


class LayerwiseSolver:
    """A walk over the blocks with a fixed plan: :meth:`start` once, :meth:`step` per block.

    Hidden states are held in ``states``, in memory by default. A step reads the weights of its own
    block only, and of what comes before the first.

    Rank r of n holds the hidden states of batches r, r + n, ... Sums are all-reduced, and the sites
    of a layer are shared.

    Attributes
    ----------
    text, fresh : list of Part
        What this rank has of the calibration text, and of fresh text.
    certifies : bool
        Whether any rank has fresh text.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        plan: Plan,
        mode: str,
        damp: float | str,
        states: HiddenStates | None = None,
    ) -> None:
        self.model, self.blocks, self.plan = model, blocks, plan
        self.mode, self.damp = mode, damp
        self.device = device_of(model)
        self.states = states or HiddenStates()
        self.text: list[Part] = []
        self.fresh: list[Part] = []
        self.certifies = False
        self.targets: dict[str, str] = {}  # by layer of the block in work
        self.ends: set[str] = set()  # layers whose norm gives what their block does
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.rows: dict[str, SiteRow] = {}

    def start(self, batches: Batches, fresh: Batches = ()) -> None:
        """Split the batches by fold, and take all hidden states to the first block."""
        folds: list[int] = []
        numbers = count()
        for index, batch in enumerate(read_batches(batches)):
            folds += batch.fold.tolist()
            mine = index % world_size() == rank()
            if mine:
                batch = with_inputs(self.model, batch)
            for fold in range(FOLDS):
                rows, number = (batch.fold == fold).nonzero().flatten(), next(numbers)
                if len(rows) and mine:
                    self.text.append(self._entered(batch.select(rows), fold, number))
        if set(folds) != set(range(FOLDS)):
            raise InputError(
                f"layerwise: each of the {FOLDS} folds needs sequences, got {len(folds)} in folds "
                f"{sorted(set(folds))}; give at least 2 sequences"
            )
        for index, batch in enumerate(read_batches(fresh)):
            self.certifies, number = True, next(numbers)
            if index % world_size() == rank():
                batch = with_inputs(self.model, batch)
                self.fresh.append(self._entered(batch, None, number))

    @property
    def parts(self) -> list[Part]:
        """All that this rank has."""
        return [*self.text, *self.fresh]

    @property
    def numbers(self) -> list[int]:
        """Which of all parts these are, whatever ranks there are."""
        return [part.number for part in self.parts]

    def _entered(self, batch: Batch, fold: int | None, number: int) -> Part:
        streams = (Stream(self.states.hold(hidden)) for hidden in 2 * [self._first(0, batch)])
        return Part(batch, fold, number, *streams)

    def _first(self, index: int, batch: Batch) -> Tensor:
        """Return the hidden states that the stack beginning at a block reads."""
        return self.blocks.enter(index, batch.to(self.device).inputs)[0][0]

    def _next_stack(self, index: int) -> None:
        """Leave one stack of blocks for the next, which begins at block ``index``."""
        read = self.blocks.read_later(index - 1)
        for part in self.parts:
            hidden = self._first(index, part.batch)
            for stream in (part.dense, part.pruned):
                if read:
                    stream.behind[index - 1] = stream.now
                stream.now = self.states.hold(hidden)

    def step(self, index: int) -> None:
        """Solve the sites of block ``index``, and take both streams past it."""
        if index > 0 and self.blocks.begins(index):
            self._next_stack(index)
        layers = self.blocks.layers[index]
        here = {name: at for name, at in layers.items() if at[0].name in self.plan.sites}
        self.targets = {name: self._target_at(layer[0]) for name, layer in layers.items()}
        after = [self._dense_run(index, part) for part in self.parts]
        consumers: dict[str, Forward] = {}
        for name, layer in here.items():
            if all(len(self.plan.sites[at.name].kept) == at.units for at in layer):
                self._keep(layer)
            else:
                with solving(name):
                    consumers[name] = self._solve(layer, self.targets[name], consumers)
        for part in self.parts:
            part.pruned.now.set(self._after(index, part, consumers))
        for part, dense in zip(self.parts, after, strict=True):
            part.dense.now = dense

    def take(self) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, SiteRow]]:
        """Hand over the weights and rows of the block that was solved last."""
        found = self.weights, self.rows
        self.weights, self.rows = {}, {}
        return found

    def streams(self) -> dict[str, list[Held]]:
        """Return the hidden states of both streams, by part."""
        found = {}
        for name in STREAMS:
            streams = [getattr(part, name) for part in self.parts]
            found[name] = [stream.now for stream in streams]
            for index in streams[0].behind if streams else ():
                found[f"{name}{BEHIND}{index}"] = [stream.behind[index] for stream in streams]
        return found

    def resume(self, streams: Mapping[str, list[Held]]) -> None:
        """Take what lies behind the streams from :meth:`streams` of a walk that was further."""
        for name, held in streams.items():
            which, behind, index = name.partition(BEHIND)
            for part, each in zip(self.parts, held, strict=True) if behind else ():
                getattr(part, which).behind[int(index)] = each

    def _dense_run(self, index: int, part: Part) -> Held:
        """Note what the dense model has at each layer, and return its stream after the block."""
        hidden = part.dense.get()
        run = self._run(index, part, part.dense)
        part.goals = {
            name: self.states.hold(self._reached(layer[0], self.targets[name], hidden, run))
            for name, layer in self.blocks.layers[index].items()
            if layer[0].name in self.plan.sites
        }
        return self.states.hold(run.output)

    def _after(self, index: int, part: Part, consumers: Mapping[str, Forward]) -> Tensor:
        """Return the pruned stream after a block whose sites are solved."""
        if part.halfway is None:
            return self._run(index, part, part.pruned, consumers).output
        (stream, x), part.halfway = (held.get() for held in part.halfway), None
        layers = self.blocks.layers[index].items()
        (mlp,) = (name for name, layer in layers if layer[0].kind == "mlp")
        device = self.blocks.device(index)
        after = stream + consumers[mlp](x.to(device)).cpu().view_as(stream)
        norm = self.blocks.norms.get(mlp)
        return after if norm is None else self.model.get_submodule(norm)(after.to(device)).detach()

    def _solve(
        self, layer: Sequence[Site], target: str, consumers: Mapping[str, Forward]
    ) -> Forward:
        """Solve the sites of a layer on their sums, and return what takes its consumer's place."""
        start = time.perf_counter()
        found = self._collect(self.text, layer, target, consumers)
        sums = dict(zip((site.name for site in layer), found, strict=True))
        found = share(layer, lambda mine: {s.name: self._solution(s, sums[s.name]) for s in mine})
        solutions = {name: Solution(**fields) for name, fields in found.items()}
        certified = self._certified(layer, target, consumers, solutions)
        new = {site.name: self._consumer(site, solutions[site.name]) for site in layer}
        seconds = (time.perf_counter() - start) / len(layer)
        for site in layer:
            counts = sums[site.name].moments.dropped_rows, sums[site.name].rows
            given = solutions[site.name], counts, target, seconds, certified[site.name]
            self._store(site, *given)
        return layer_forward(self.model, layer, new)

    def _collect(
        self,
        parts: Sequence[Part],
        layer: Sequence[Site],
        target: str,
        consumers: Mapping[str, Forward],
    ) -> list[LayerSums]:
        """Return the sums over x̂ and the residual, of all ranks; those of fresh text in fold 0."""
        device = self.blocks.device(self.blocks.index_of(layer[0]))
        sums = [LayerSums.zeros(site, device) for site in layer]
        for part in parts:
            read = self._read(layer, target, part, consumers)
            for each, rows in zip(sums, read, strict=True):
                each.add(rows, part.fold or 0)
        counts = gather([each.rows for each in sums])
        for each, rows in zip(sums, zip(*counts, strict=True), strict=True):
            all_reduce(*vars(each.moments).values(), *vars(each.residual).values())
            each.rows = sum(rows)
        return sums

    def _solution(self, site: Site, sums: LayerSums) -> dict[str, object]:
        """Return the fields of the solution of a site."""
        weight = get_consumer_weight(self.model, site)
        bias = get_consumer_bias(self.model, site)
        kept, planned = self.plan.sites[site.name].kept, self.plan.sites[site.name].bias
        affine = self.mode != "linear" and (bias is not None or planned)
        mode = "affine" if affine else "linear"
        if site.expert is not None:
            mode = form_of_expert(mode, bias is not None, sums.moments)
        features, choices = site.features(kept), {"mode": mode, "damp": self.damp}
        choices |= {"target": sums.residual, "step": (0.0, 1.0)}
        return vars(solve(weight, bias, sums.moments, features, **choices))

    def _consumer(self, site: Site, solution: Solution) -> Forward:
        """Return the consumer that a site has from now on, as a function of all its features."""
        weight, bias = (get(self.model, site) for get in (get_consumer_weight, get_consumer_bias))
        features = site.features(self.plan.sites[site.name].kept).to(weight.device)
        new = solution.weight.to(weight.dtype)
        new_bias = bias if solution.bias is None else solution.bias.to(weight.dtype)

        def consumer(x: Tensor) -> Tensor:
            return nn.functional.linear(x[..., features], new, new_bias)

        return consumer

    def _read(
        self, layer: Sequence[Site], target: str, part: Part, consumers: Mapping[str, Forward]
    ) -> list[Rows]:
        """Return what the consumers of a layer read of a part, and what they fall short by.

        The residual is what the dense model has there less what the pruned one has with the dense
        weight in this site.
        """
        site, name = layer[0], layer[0].team
        # Only the stream after an MLP needs the block run to its end, if no norm reads it before.
        late = site.kind == "mlp" and name not in self.blocks.norms
        end = None if target == "stream" and late else name
        hidden = part.pruned.get()
        run = self._run(self.blocks.index_of(site), part, part.pruned, consumers, end)
        read, output = run.seen[name]

        def counts(tokens: int) -> Tensor:
            return counted(part.batch, site, tokens, output, run.sums.get(name))

        r = part.goals[name].get() - self._reached(site, target, hidden, run)
        part.halfway = self._halfway(site, hidden, run)
        return rows_of(self.model, layer, read, r.to(output.device).flatten(0, -2), counts)

    def _certified(
        self,
        layer: Sequence[Site],
        target: str,
        consumers: Mapping[str, Forward],
        solutions: Mapping[str, Solution],
    ) -> dict[str, float | None]:
        """Return the error of each site on fresh text, or None without any."""
        if not self.certifies:
            return dict.fromkeys(solutions)
        errors = {}
        sums = self._collect(self.fresh, layer, target, consumers)
        for site, each in zip(layer, sums, strict=True):
            given = (get(self.model, site) for get in (get_consumer_weight, get_consumer_bias))
            solution, kept = solutions[site.name], site.features(self.plan.sites[site.name].kept)
            new = solution.weight, solution.bias
            errors[site.name] = error_on(*given, kept, new, each.moments, each.residual)
        return errors

    def _halfway(self, site: Site, hidden: Tensor, run: Run) -> tuple[Held, Held] | None:
        """Return what :class:`Part` keeps of a run, if no more than a sum or its norm follows."""
        here = self.blocks.layers[self.blocks.index_of(site)]
        mlps = [name for name, layer in here.items() if layer[0].kind == "mlp"]
        if mlps != [site.name] or len(here) == 1:
            return None
        x, added = run.seen[site.name]
        if site.name in self.ends:
            stream = run.sums[site.name] - added.view_as(hidden)
        elif all(self.targets.get(name) == "stream" for name in here) and (
            self.blocks.norms.keys().isdisjoint(here)
        ):
            stream = self.blocks.after_attention(site, hidden, run, itself=False)
        else:
            return None
        return self.states.hold(stream), self.states.hold(x)

    def _target_at(self, site: Site) -> str:
        """Return the target that the arithmetic of the block allows: "stream", else "branch"."""
        plain, norm, ends = broadcast(self._sum_at(site) if is_first() else None)
        if norm is not None:
            self.blocks.norms[site.team] = norm
        if ends:
            self.ends.add(site.team)
        return "stream" if plain or norm is not None else "branch"

    def _sum_at(self, site: Site) -> tuple[bool, str | None, bool]:
        """Tell whether a block adds what a site gives plainly, or which norm reads and ends it."""
        part = self.parts[0]
        one = part.batch.select([0]).to(self.device).inputs
        hidden = part.dense.get()[:1].to(self.blocks.device(self.blocks.index_of(site)))
        with self.blocks.answering(part.dense.answers(1)):
            if self.blocks.adds_plainly(site, one, hidden):
                return True, None, False
            norm = self.blocks.norm_of_sum(site, one, hidden)
            return False, norm, norm is not None and self.blocks.ends_with(norm, site, one, hidden)

    def _keep(self, layer: Sequence[Site]) -> None:
        """Note that a layer loses nothing and keeps the weights that it has."""
        certified = 0.0 if self.certifies else None
        for site in layer:
            weight = get_consumer_weight(self.model, site).double()
            solution = Solution(weight, None, math.inf, 0.0, 0.0, 1.0, "kept as it is")
            self._store(site, solution, (0, 0), "dense-input", 0.0, certified)

    def _store(
        self,
        site: Site,
        solution: Solution,
        counts: tuple[int, int],  # rows dropped, and all
        target: str,
        seconds: float,
        certified: float | None,
    ) -> None:
        self.weights[site.name] = (solution.weight, solution.bias)
        units = len(self.plan.sites[site.name].kept)
        row = report_row(site, units, counts[0], solution, seconds, target)
        tokens = None if site.expert is None else counts[1]
        row = replace(row, certified_error=certified, tokens=tokens)
        if target == "branch":
            row = replace(row, path=f"{row.path}; branch, as the stream is not a plain sum here")
        self.rows[site.name] = row

    def _run(
        self,
        index: int,
        part: Part,
        stream: Stream,
        consumers: Mapping[str, Forward] | None = None,
        end: str | None = None,
    ) -> Run:
        inputs = part.batch.to(self.device).inputs
        hidden = stream.get().to(self.blocks.device(index))
        with self.blocks.answering(stream.answers()):
            return self.blocks.run(index, inputs, hidden, consumers, end)

    def _reached(self, site: Site, target: str, hidden: Tensor, run: Run) -> Tensor:
        """Return the consumer's output, or the stream after the site, on the CPU.

        Where a norm follows the sum, the stream is what that reads: it passes on no more than that.
        In float32, or float64 as the model is: the difference of two of these is the residual.
        """
        if target == "stream" and site.team in run.sums:
            return _wide(run.sums[site.team]).view_as(hidden)
        if target == "stream" and site.kind == "mlp":
            return _wide(run.output)
        if target == "stream":
            return self.blocks.after_attention(site, _wide(hidden), run)
        return _wide(run.seen[site.team][1]).view_as(hidden)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))
