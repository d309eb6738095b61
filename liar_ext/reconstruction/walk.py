"""A walk over the blocks of a model: two streams, and one solve per site on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from liar_ext.calibration.moments import Moments
from liar_ext.data.batches import FOLDS, Batch, Batches, read_batches
from liar_ext.data.hidden_states import Held, HiddenStates
from liar_ext.errors import InputError, solving
from liar_ext.models.inputs import complete_inputs
from liar_ext.models.running import device_of
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight
from liar_ext.plan import Plan
from liar_ext.reconstruction.block_runner import Blocks, Forward, Run
from liar_ext.reconstruction.result import Solution
from liar_ext.reconstruction.ridge import solve
from liar_ext.reconstruction.rows import report_row
from liar_ext.reconstruction.targets import Shortfall, solve_towards
from liar_ext.report.rows import SiteRow

STREAMS, BEHIND = ("dense", "pruned"), " behind "
SHARES = {"branch": (1.0, 1.0), "stream": (1.0, 1.0), "auto": (0.0, 1.0)}


@dataclass
class Stream:
    """Hidden states of some sequences, (sequences, tokens, hidden), in one of both models.

    Parameters
    ----------
    now : Held
        Before the block that comes next.
    behind : dict of int to Held
        What came out of the stacks before, as far as a later one reads it, by the last block.
    """

    now: Held
    behind: dict[int, Held] = field(default_factory=dict)

    def get(self) -> Tensor:
        """Return the hidden states before the block that comes next."""
        return self.now.get()


@dataclass
class Part:
    """Sequences of one fold, or fresh ones, and how far they are.

    Parameters
    ----------
    batch : Batch
        As the model takes them.
    fold : int, optional
        Their fold; None where they are fresh: no solve reads them, errors are measured on them.
    dense, pruned : Stream
        Both streams.
    goals : dict of str to Held
        By site of the block in work, what the dense model has there: the output of the consumer, or
        the stream after it.
    halfway : (Held, Held), optional
        The pruned stream between attention and MLP of the block in work, and what the MLP's
        consumer reads: all that a new one needs to finish the block.
    """

    batch: Batch
    fold: int | None
    dense: Stream
    pruned: Stream
    goals: dict[str, Held] = field(default_factory=dict)
    halfway: tuple[Held, Held] | None = None


class Walk:
    """A walk over the blocks with a fixed plan: :meth:`start` once, :meth:`step` per block.

    Hidden states are held in ``states``, in memory by default. A step reads the weights of its own
    block only, and of what comes before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        plan: Plan,
        mode: str,
        damp: float | str,
        target: str,
        refit: bool,
        states: HiddenStates | None = None,
    ) -> None:
        self.model, self.blocks, self.plan = model, blocks, plan
        self.mode, self.damp, self.target, self.refit = mode, damp, target, refit
        self.device = device_of(model)
        self.states = states or HiddenStates()
        self.parts: list[Part] = []
        self.targets: dict[str, str] = {}  # by site of the block in work
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.rows: dict[str, SiteRow] = {}

    def start(self, batches: Batches, fresh: Batches = ()) -> None:
        """Split the batches by fold, and take all hidden states to the first block."""
        sequences = 0
        for batch in read_batches(batches):
            batch = with_inputs(self.model, batch)
            sequences += len(batch)
            for index in range(FOLDS):
                rows = (batch.fold == index).nonzero().flatten()
                if len(rows):
                    self._enter(batch.select(rows), index)
        folds = {part.fold for part in self.parts}
        if folds != set(range(FOLDS)):
            raise InputError(
                f"layerwise: each of the {FOLDS} folds needs sequences, got {sequences} in folds "
                f"{sorted(folds)}; give at least 2 sequences"
            )
        for batch in read_batches(fresh):
            self._enter(with_inputs(self.model, batch), None)

    def _enter(self, batch: Batch, fold: int | None) -> None:
        streams = (Stream(self.states.hold(hidden)) for hidden in 2 * [self._first(0, batch)])
        self.parts.append(Part(batch, fold, *streams))

    def _first(self, index: int, batch: Batch) -> Tensor:
        """Return the hidden states that the stack beginning at a block reads."""
        return self.blocks.enter(index, batch.to(self.device).inputs)[0][0]

    def _turn(self, index: int) -> None:
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
            self._turn(index)
        here = [site for site in self.blocks.sites[index] if site.name in self.plan.sites]
        lossless = {
            site.name for site in here if len(self.plan.sites[site.name].kept) == site.units
        }
        dense_too = self.target != "dense-input"  # which needs no dense stream
        self.targets = {site.name: self._target_at(site) for site in self.blocks.sites[index]}
        after = [self._dense_run(index, part) for part in self.parts] if dense_too else []
        consumers: dict[str, Forward] = {}
        for site in here:
            if site.name in lossless and not (self.refit and dense_too):
                self._keep(site)
            else:
                with solving(site.name):
                    consumers[site.name] = self._solve(site, self.targets[site.name], consumers)
        for part in self.parts:
            part.pruned.now.set(self._after(index, part, consumers))
        for part, dense in zip(self.parts, after, strict=False):
            part.dense.now = dense

    def streams(self) -> dict[str, list[Held]]:
        """Return the hidden states of both streams, by part."""
        found = {}
        for name in STREAMS:
            streams = [getattr(part, name) for part in self.parts]
            found[name] = [stream.now for stream in streams]
            for index in streams[0].behind:
                found[f"{name}{BEHIND}{index}"] = [stream.behind[index] for stream in streams]
        return found

    def go_on(self, streams: Mapping[str, list[Held]]) -> None:
        """Take what lies behind the streams from :meth:`streams` of a walk that was further."""
        for name, held in streams.items():
            which, behind, index = name.partition(BEHIND)
            for part, each in zip(self.parts, held, strict=True) if behind else ():
                getattr(part, which).behind[int(index)] = each

    def _dense_run(self, index: int, part: Part) -> Held:
        """Note what the dense model has at each site, and return its stream after the block."""
        hidden = part.dense.get()
        run = self._run(index, part, part.dense)
        part.goals = {
            site.name: self.states.hold(self._reached(site, self.targets[site.name], hidden, run))
            for site in self.blocks.sites[index]
            if site.name in self.plan.sites
        }
        return self.states.hold(run.output)

    def _after(self, index: int, part: Part, consumers: Mapping[str, Forward]) -> Tensor:
        """Return the pruned stream after a block whose sites are solved."""
        if part.halfway is None:
            return self._run(index, part, part.pruned, consumers).output
        (stream, x), part.halfway = (held.get() for held in part.halfway), None
        (mlp,) = (site.name for site in self.blocks.sites[index] if site.kind == "mlp")
        return stream + consumers[mlp](x.to(self.blocks.device(index))).cpu().view_as(stream)

    def _solve(self, site: Site, target: str, consumers: Mapping[str, Forward]) -> Forward:
        """Collect the sums of a site, solve it, and return what takes the consumer's place."""
        start = time.perf_counter()
        weight = get_consumer_weight(self.model, site)
        bias = get_consumer_bias(self.model, site)
        kept, planned = self.plan.sites[site.name].kept, self.plan.sites[site.name].bias
        moments, shortfall = self._collect(site, target, consumers)
        features = site.features(kept).to(weight.device)
        affine = self.mode != "linear" and (bias is not None or planned)
        mode = "affine" if affine else "linear"
        solution = (
            solve(weight, bias, moments, features, mode=mode, damp=self.damp)
            if shortfall is None
            else solve_towards(
                weight,
                bias,
                moments,
                shortfall,
                features,
                mode=mode,
                damp=self.damp,
                shares=SHARES[self.target],
            )
        )
        new = solution.weight.to(weight.dtype)
        new_bias = bias if solution.bias is None else solution.bias.to(weight.dtype)

        def consumer(x: Tensor) -> Tensor:
            return nn.functional.linear(x[..., features], new, new_bias)

        certified = self._certified(site, target, consumers, consumer)
        seconds = time.perf_counter() - start
        self._store(site, solution, moments, target, seconds, certified)
        return consumer

    def _collect(
        self, site: Site, target: str, consumers: Mapping[str, Forward]
    ) -> tuple[Moments, Shortfall | None]:
        """Return the sums over x̂, and over the shortfall unless the target is the site's own."""
        device = self.blocks.device(self.blocks.index_of(site))
        moments = Moments.zeros(site.d_in, device=device)
        shortfall = None
        if target != "dense-input":
            shortfall = Shortfall.zeros(site.d_in, site.d_out, device=device)
        for part in self.parts:
            if part.fold is None:
                continue
            x, r, weight = self._read(site, target, part, consumers)
            if shortfall is None:
                moments.update(x, part.fold, weight)
                continue
            x = x.to(r.dtype)
            usable = torch.isfinite(x).all(-1) & torch.isfinite(r).all(-1)
            moments.count[part.fold, 1] += (weight & ~usable).sum()
            moments.update(x, part.fold, weight & usable)
            shortfall.update(x, r, part.fold, weight & usable)
        return moments, shortfall

    def _read(
        self, site: Site, target: str, part: Part, consumers: Mapping[str, Forward]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return of a part x̂, the shortfall or None for the site's own target, and what counts.

        The shortfall is what the dense model has there less what the pruned one has with the dense
        weight in this site.
        """
        # Only the stream after an MLP needs the block run to its end, if no norm reads it before.
        late = site.kind == "mlp" and site.name not in self.blocks.norms
        end = None if target == "stream" and late else site.name
        hidden = part.pruned.get()
        run = self._run(self.blocks.index_of(site), part, part.pruned, consumers, end)
        x = run.seen[site.name][0].flatten(0, -2)
        weight = part.batch.counting(len(x), x.device, site.part.mask)
        if target == "dense-input":
            return x, None, weight
        r = part.goals[site.name].get() - self._reached(site, target, hidden, run)
        part.halfway = self._halfway(site, hidden, run)
        return x, r.to(x.device).flatten(0, -2), weight

    def _certified(
        self, site: Site, target: str, consumers: Mapping[str, Forward], new: Forward
    ) -> float | None:
        """Return ``Σ |W x̂ + b + r − new(x̂)|² / Σ |W x̂|²`` over fresh text, or None without any."""
        weight, bias = get_consumer_weight(self.model, site), get_consumer_bias(self.model, site)
        error = energy = 0.0
        fresh = [part for part in self.parts if part.fold is None]
        for part in fresh:
            x, r, counts = self._read(site, target, part, consumers)
            dense = nn.functional.linear(x, weight)
            left = (dense if bias is None else dense + bias) - new(x)
            left = left.double() if r is None else left.double() + r
            usable = counts & torch.isfinite(left).all(-1)
            error += float(left[usable].square().sum())
            energy += float(dense[usable].double().square().sum())
        if not fresh:
            return None
        return error / energy if energy else math.nan

    def _halfway(self, site: Site, hidden: Tensor, run: Run) -> tuple[Held, Held] | None:
        """Return what :class:`Part` keeps of a run, if the block is a plain sum of both sites."""
        at = self.blocks.sites[self.blocks.index_of(site)]
        here = [other.name for other in at]
        plain = all(self.targets.get(name) == "stream" for name in here)
        plain = plain and self.blocks.norms.keys().isdisjoint(here)
        if site.kind != "mlp" or len(at) == 1 or not plain:
            return None
        stream = self.blocks.after_attention(site, hidden, run, itself=False)
        return self.states.hold(stream), self.states.hold(run.seen[site.name][0])

    def _target_at(self, site: Site) -> str:
        """Return the target that the arithmetic of the block allows."""
        if self.target in ("dense-input", "branch"):
            return self.target
        part = self.parts[0]
        one = part.batch.select([0]).to(self.device).inputs
        hidden = part.dense.get()[:1].to(self.blocks.device(self.blocks.index_of(site)))
        behind = {end: partial(_first_of, held) for end, held in part.dense.behind.items()}
        with self.blocks.answering(behind):
            if self.blocks.adds_plainly(site, one, hidden):
                return "stream"
            norm = self.blocks.norm_of_sum(site, one, hidden)
        if norm is None:
            return "branch"
        self.blocks.norms[site.name] = norm
        return "stream"

    def _keep(self, site: Site) -> None:
        """Note that a site loses nothing and keeps the weight that it has."""
        weight = get_consumer_weight(self.model, site).double()
        solution = Solution(weight, None, math.inf, 0.0, 0.0, 1.0, "kept as it is")
        certified = 0.0 if any(part.fold is None for part in self.parts) else None
        self._store(site, solution, Moments.zeros(0), "dense-input", 0.0, certified)

    def _store(
        self,
        site: Site,
        solution: Solution,
        moments: Moments,
        target: str,
        seconds: float,
        certified: float | None,
    ) -> None:
        self.weights[site.name] = (solution.weight, solution.bias)
        units = len(self.plan.sites[site.name].kept)
        row = report_row(site, units, moments, solution, seconds, target)
        row = replace(row, certified_error=certified)
        if self.target in ("stream", "auto") and target == "branch":
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
        with self.blocks.answering({end: held.get for end, held in stream.behind.items()}):
            return self.blocks.run(index, inputs, hidden, consumers, end)

    def _reached(self, site: Site, target: str, hidden: Tensor, run: Run) -> Tensor:
        """Return the consumer's output, or the stream after the site, on the CPU.

        Where a norm follows the sum, the stream is what that reads: it passes on no more than that.
        In float32, or float64 as the model is: the difference of two of these is the shortfall.
        """
        if target == "stream" and site.name in run.sums:
            return _wide(run.sums[site.name]).view_as(hidden)
        if target == "stream" and site.kind == "mlp":
            return _wide(run.output)
        if target == "stream":
            return self.blocks.after_attention(site, _wide(hidden), run)
        return _wide(run.seen[site.name][1]).view_as(hidden)


def with_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with what the decoder reads where an encoder is there, too."""
    return replace(batch, inputs=complete_inputs(model, batch.inputs, batch.labels))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def _first_of(held: Held) -> Tensor:
    return held.get()[:1]
