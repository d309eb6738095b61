"""Solve a plan's sites, by one schedule or the better of two; rescale the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.batches import FOLDS, Batch, Batches, probe_batches
from liar_ext.calibration.collect import Passes
from liar_ext.calibration.divergence import DenseOutputs, Divergence
from liar_ext.job.state import Evaluation, Job
from liar_ext.models.plan import Plan
from liar_ext.models.recipe import Recipe
from liar_ext.models.residual_stream import stream_of
from liar_ext.models.running import base_path, evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.reconstruction.layerwise import Solved as Block
from liar_ext.reconstruction.layerwise import reconstruct_layerwise, solve_layerwise
from liar_ext.reconstruction.solve import SiteRow, error_on, reconstruct_shared
from liar_ext.reconstruction.streams import Weights
from liar_ext.selection.sensitivity import blocks_before, pruned_site, recorded, replayed
from liar_ext.system.distributed import broadcast, gather
from liar_ext.system.progress import Bar

# Of a calibration set with enough sequences every n-th is held out, up to so many.
HELD_OUT_EVERY, LEAST, MOST = 8, 32, 64
# The cheaper one first.
SCHEDULES = ("one-pass", "layerwise")
JUDGED = 16  # sequences of documents of their own that the command draws, of 128 or more
# A scale is moved by this to see the change. In half precision by more, and both ways: rounding of
# the outputs as they are would be in every difference, and add up in the slope.
NUDGE, HALF_NUDGE = 0.02, 0.1
LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # μ, in means of the diagonal of H
ROWS = 2  # sequences of a batch: outputs of all handles are held for them
PIECE = 1 << 19  # numbers of a row of J that are multiplied at a time


def sequences_to_judge(recipe: Recipe) -> int:
    """Return how many sequences a command draws to judge models by, beside those of the recipe."""
    auto = recipe.schedule == "auto" and recipe.settled().schedule == "layerwise"
    judges = auto and recipe.prunes_sites
    return min(max(recipe.samples // HELD_OUT_EVERY, FOLDS), JUDGED) if judges else 0


def hold_out(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those to calibrate on and those to judge whole models by.

    Every eighth sequence of text is held out, 64 at most, in one fold after the other. Random and
    generated sequences (``source`` -1) are not. A set of fewer than 32 sequences stays whole.
    """
    batches = list(batches)
    places = [
        (index, row)
        for fold in range(FOLDS)
        for index, batch in enumerate(batches)
        for row in (batch.fold == fold).nonzero().flatten().tolist()
        if batch.source is None or batch.source[row] >= 0
    ]
    if len(places) < LEAST:
        return batches, []
    count = min(len(places) // HELD_OUT_EVERY, MOST)
    taken = {places[(2 * step + 1) * len(places) // (2 * count)] for step in range(count)}
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    for index, batch in enumerate(batches):
        judged = torch.tensor([(index, row) in taken for row in range(len(batch))])
        for part, rows in zip(parts, ((~judged).nonzero(), judged.nonzero()), strict=True):
            if len(rows):
                part.append(batch.select(rows.flatten()))
    return parts


@dataclass
class Solved:
    """The solved sites of a plan, block by block; a model in memory is one block, of index None."""

    blocks: Iterable[tuple[int | None, Weights, Mapping[str, SiteRow]]]
    schedule: str
    source: Mapping[str, int]  # of the text that was calibrated on
    facts: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def reconstruct(job: Job, passes: Passes | None, plan: Plan, evaluation: Evaluation) -> Solved:
    """Solve the sites of a plan; in a walk, text to evaluate on passes the blocks, too."""
    recipe, walk = job.recipe, job.walk
    if walk is None:
        none = Solved([(None, {}, {})], recipe.schedule, {})
        solved = none if passes is None else solve(job, passes, plan)
        evaluation.see_dense()
        return solved
    if recipe.keep_experts == 1.0:  # else the dense experts are gone
        evaluation.see_dense(passes)
    facts = {"max_memory": job.limit}

    def blocks() -> Iterator[Block]:
        along, how = [job.out.fixed, *evaluation.along], (recipe.reconstruct, recipe.damp)
        if passes is None or recipe.schedule == "layerwise":
            yield from solve_layerwise(walk, plan, *how, job.batches, job.certify_on or (), along)
        else:
            yield from passes.solve(plan, along)
        facts["calibrate_passes"] = 0 if passes is None else len(passes.summed)
        facts["hidden_states_on_disk"] = walk.states.most_on_disk

    source = {} if passes is None else passes.bank.source
    return Solved(job.clock.each("reconstruct", blocks()), recipe.schedule, source, facts)


def solve(job: Job, passes: Passes, plan: Plan) -> Solved:
    """Solve the sites of a model in memory by the job's schedule, or the better of both."""
    schedule, found = job.recipe.schedule, {}
    if job.judged is None:
        weights, rows = _solve(job, schedule, passes, plan)
    else:
        with job.clock("judge"):
            judge, at = Divergence(job.model, job.judged), job.sites(passes.model)
        for each in SCHEDULES:
            solved = _solve(job, each, passes, plan)
            with job.clock("judge"):
                found[each] = divergence_of(judge, passes.model, at, plan, solved[0])
            if len(found) == 1 or found[each] < found[schedule]:
                schedule, (weights, rows) = each, solved
    facts = {"calibrate_passes": len(passes.summed)} | ({"schedules": found} if found else {})
    source = passes.bank.source
    if job.certify_on is not None and schedule == "one-pass":  # a walk has measured it
        with job.clock("certify"):
            passes.bank = MomentBank()  # its memory is for the fresh sums
            text = passes.model, job.certify_on, job.sites(passes.model), job.room
            unseen = Passes(*text)  # no decision saw it: without bias
            for site in (site for group in unseen for site in group):
                new = passes.model, site, plan, weights[site.name]
                error = error_on(*new, unseen.bank[site.name])  # a name would keep the sums
                rows[site.name] = replace(rows[site.name], certified_error=error)
    return Solved([(None, weights, rows)], schedule, source, facts)


def _solve(
    job: Job, schedule: str, passes: Passes, plan: Plan
) -> tuple[Weights, dict[str, SiteRow]]:
    settings = {"mode": job.recipe.reconstruct, "damp": job.recipe.damp}
    if schedule == "layerwise":
        settings |= {"fresh": job.certify_on or (), "saved": job.saved}
        with job.clock("reconstruct"):
            weights, rows = reconstruct_layerwise(passes.model, passes.batches, plan, **settings)
        return weights, {row.name: row for row in rows}
    weights, rows = {}, {}
    for group in job.clock.each("calibrate", passes.back()):
        with job.clock("reconstruct"):
            # A name for the bank would keep it while the next group's is summed.
            some = reconstruct_shared(passes.model, passes.bank, plan, group, **settings)
            weights, rows = weights | some[0], rows | some[1]
    return weights, rows


@torch.no_grad()
def divergence_of(
    judge: Divergence, model: nn.Module, at: Iterable[Site], plan: Plan, weights: Weights
) -> float:
    """Return the divergence of a model with all its sites pruned from the judge's dense one."""
    with ExitStack() as pruned:
        for site in at:
            pruned.enter_context(pruned_site(model, site, plan, weights[site.name]))
        found = judge.of(model)["divergence"]
    return math.inf if math.isnan(found) else found


@dataclass(frozen=True)
class Handle:
    """A module whose output is scaled by a factor in its weights."""

    name: str  # of its layer, or head for the norm that the head reads
    path: str  # of a consumer, the norm that a block reads it through, or the last norm
    block: int  # blocks before this one don't depend on the scale
    offset: float = 0.0  # that its forward adds to its weight


@dataclass(frozen=True)
class Rescaled:
    """Scales, and divergences per row on the text that they were fitted on; None if not finite."""

    scales: dict[str, float] = field(default_factory=dict)  # 1 + s by layer; empty if none is good
    before: float | None = None
    after: float | None = None
    held_out: float = 0.0  # its change on batches that were not fitted on, by the expansion

    def facts(self) -> dict[str, float | None]:
        """Return the numbers for a report."""
        least, most = (f(self.scales.values(), default=1.0) for f in (min, max))
        return {
            "divergence_unscaled": self.before,
            "divergence_rescaled": self.after,
            "held_out_change": self.held_out,
            "least_scale": least,
            "greatest_scale": most,
        }


def rescale_batches(batches: Batches) -> list[dict[str, Tensor]]:
    """Return the beginnings of calibration sequences, evenly spread, to fit scales on."""
    return probe_batches(batches, every=True, rows=ROWS)


@torch.no_grad()
def rescale(dense_outputs: Divergence, pruned: nn.Module, attn_unit: str = "auto") -> Rescaled:
    """Scale the outputs of layers, so that a sliced model is nearest to the dense one.

    A site is solved for a target of its own and can't see the joint loss of all. With z the logits
    of the pruned model, q its distribution, p the dense model's and J = ∂z / ∂s by differences, the
    divergence is to second order::

        E KL(p ‖ q_s) ≈ E KL(p ‖ q) + gᵀ s + ½ sᵀ H s
        g = E (q − p)ᵀ J        H = E Jᵀ (diag q − q qᵀ) J        s = −(H + μ I)⁻¹ g

    μ has the least divergence on each batch with the s of all others. Nothing is multiplied unless
    held-out batches, and all of them together, are nearer by it. Without logits, q and p are states
    (:class:`liar_ext.calibration.divergence.DenseOutputs`).
    """
    every = sites(pruned, attn_unit=attn_unit)
    handles, (blocks, _) = handles_of(pruned, every), blocks_before(pruned, every)
    bar = Bar(list(dense_outputs.outputs.items()), desc="rescale")
    with evaluating(pruned):
        own = {at: _expansion(each, pruned, handles, blocks) for at, each in bar}
    pairs = [pair for share in gather(own) for pair in share.items()]
    found = [each for _, each in sorted(pairs, key=lambda pair: pair[0])]
    rows = sum(each.rows for each in found)
    before = sum(each.divergence for each in found) / max(rows, 1)
    if not rows or not math.isfinite(before):
        return Rescaled()
    _, change, step = broadcast(best_step(found))
    if step is None:
        return Rescaled(before=before, after=before)
    factors = dict(zip(handles, (1 + step).tolist(), strict=True))
    with _scaled(pruned, factors):
        after = dense_outputs.of(pruned)["divergence"]
    if not after < before:
        return Rescaled(before=before, after=before)
    for handle, factor in factors.items():
        _multiply(pruned.get_submodule(handle.path), factor, handle.offset)
    scales = {handle.name: factor for handle, factor in factors.items()}
    return Rescaled(scales, before, after, change)


def handles_of(model: nn.Module, at: Sequence[Site]) -> list[Handle]:
    """Return a module for each layer of sites but experts, and the last norm.

    A norm that follows a consumer takes its place: scaling its input changes nothing.
    """
    row, (blocks, places) = stream_of(model), blocks_before(model, at)
    handles = []
    for name, layer in teams_of(at).items():
        site = layer[0]
        if site.expert is not None:
            continue
        norm = site.wiring.output_norm if row is not None else ""
        path = f"{site.path}.{norm}" if norm else site.consumer
        handles.append(Handle(name, path, places[site.name], row.norm_offset if norm else 0.0))
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    for chain in () if row is None or head is None else row.ends:
        does, layers = chain[0]
        path = base_path(model) + layers[0]
        if does == "norm" and getattr(modules.get(path), "weight", None) is not None:
            handles.append(Handle("head", path, len(blocks), row.norm_offset))
            break
    return handles


@dataclass(frozen=True)
class Expansion:
    """The divergence of a pruned model around its weights, summed over some rows."""

    rows: int
    divergence: float  # of the model as it is
    slope: Tensor  # g, (handles,) float64
    curvature: Tensor  # H, (handles, handles) float64

    def change(self, step: Tensor) -> float:
        """Return the change of the divergence by a step."""
        return float(self.slope @ step + 0.5 * step @ self.curvature @ step)


def best_step(found: Sequence[Expansion]) -> tuple[float, float, Tensor | None]:
    """Return μ, the held-out change per row, and the step; None if none is better."""
    found = [each for each in found if each.rows]
    rows = sum(each.rows for each in found)
    if len(found) < 2 or not all(torch.isfinite(each.curvature).all() for each in found):
        return math.inf, 0.0, None
    slope, curvature = sum(e.slope for e in found), sum(e.curvature for e in found)
    changes = {
        damp: sum(
            each.change(_step(slope - each.slope, curvature - each.curvature, damp))
            for each in found
        )
        for damp in LADDER
    }
    damp = min(changes, key=changes.get)
    if not changes[damp] < 0:
        return math.inf, 0.0, None
    return damp, changes[damp] / rows, _step(slope, curvature, damp)


def _step(slope: Tensor, curvature: Tensor, damp: float) -> Tensor:
    """Return ``−(H + μ I)⁻¹ g``; zero where the outputs don't change at all."""
    scale = curvature.diagonal().mean()
    if not scale > 0:
        return torch.zeros_like(slope)
    eye = torch.eye(len(slope), dtype=slope.dtype, device=slope.device)
    return -torch.linalg.solve(curvature + damp * scale * eye, slope)


def _expansion(
    dense: DenseOutputs, pruned: nn.Module, handles: Sequence[Handle], blocks: Sequence[nn.Module]
) -> Expansion:
    given: list = []
    with recorded(blocks, given):
        rows = dense.outputs(pruned).float()
    slopes, root, centre = dense.metric(rows)
    slope = torch.zeros(len(handles), dtype=torch.float64)
    jacobian = torch.empty(len(handles), rows.numel(), dtype=torch.bfloat16, device=rows.device)
    for index, handle in enumerate(handles):
        with replayed(blocks[: handle.block], given):
            moved = _derivative(dense, pruned, handle, rows)
        if centre is not None:
            moved -= (centre * moved).sum(-1, keepdim=True)
        slope[index] = (slopes * moved).sum(dtype=torch.float64)
        jacobian[index] = (root * moved).flatten()
    curvature = torch.zeros(len(handles), len(handles), dtype=torch.float64)
    for piece in jacobian.split(PIECE, 1):
        piece = piece.float()
        curvature += (piece @ piece.mT).double().cpu()
    return Expansion(len(rows), dense.divergence_of(rows), slope, curvature)


def _derivative(dense: DenseOutputs, pruned: nn.Module, handle: Handle, rows: Tensor) -> Tensor:
    """Return the change of the outputs per unit of a scale; ``rows`` are those without."""

    def at(factor: float) -> Tensor:
        with _scaled(pruned, {handle: factor}):
            return dense.outputs(pruned).float()

    if torch.finfo(pruned.dtype).bits >= 32:
        return (at(1 + NUDGE) - rows) / NUDGE
    return (at(1 + HALF_NUDGE) - at(1 - HALF_NUDGE)) / (2 * HALF_NUDGE)


@contextmanager
def _scaled(model: nn.Module, factors: Mapping[Handle, float]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle, factor in factors.items():
            scale = lambda _, args, output, factor=factor: output * factor  # noqa: E731
            stack.enter_context(model.get_submodule(handle.path).register_forward_hook(scale))
        yield


def _multiply(module: nn.Module, factor: float, offset: float) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
    weight.copy_((weight.double() + offset) * factor - offset)
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() * factor)
