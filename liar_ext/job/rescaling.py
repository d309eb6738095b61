"""One scale for what each site gives, so that the whole pruned model is nearest to the dense one.

Every site is solved for a target of its own, and what they lose together no site sees. A few
numbers see it: the outputs of the consumers times ``1 + s_k``, and what the head reads times
``1 + s``. With z the logits of the pruned model, q its distribution and p the dense model's, the
divergence is to second order

    E KL(p ‖ q_s) ≈ E KL(p ‖ q) + gᵀ s + ½ sᵀ H s
    g = E (q − p)ᵀ J        H = E Jᵀ (diag q − q qᵀ) J        J = ∂z / ∂s

with J by forward differences. So ``s = −(H + μ I)⁻¹ g``, and μ has the least held-out divergence:
fitted on all batches but one, and judged on that. Without logits the divergence is that of
:class:`liar_ext.calibration.divergence.DenseOutputs`, and q and p are states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batches, probe_batches
from liar_ext.calibration.divergence import DenseOutputs, Divergence
from liar_ext.models.residual_stream import stream_of
from liar_ext.models.running import base_path, evaluating
from liar_ext.models.sites import Site, sites, teams_of
from liar_ext.selection.sensitivity import blocks_before, recorded, replayed
from liar_ext.system.distributed import broadcast, gather
from liar_ext.system.progress import Bar

# By which a scale is moved to see what changes. In half precision more, and both ways: rounding of
# the outputs as they are would be in every difference to them, and in q, and add up in the slope.
NUDGE, HALF_NUDGE = 0.02, 0.1
LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # μ, in means of the diagonal of H
ROWS = 2  # sequences of a batch: outputs of all handles are held for them
PIECE = 1 << 19  # numbers of a row of J that are multiplied at a time


@dataclass(frozen=True)
class Handle:
    """A module whose output is scaled by a factor in its weights."""

    name: str  # of its layer, or head for the norm that the head reads
    path: str  # of a consumer, the norm that a block reads it through, or the last norm
    block: int  # blocks before this one give the same whatever the scale
    offset: float = 0.0  # what its forward adds to its weight


@dataclass(frozen=True)
class Rescaled:
    """What :func:`rescale` found.

    Divergences are per row, on the text that scales were fitted on; None where not finite.
    """

    scales: dict[str, float] = field(default_factory=dict)  # 1 + s by layer; empty if none is good
    before: float | None = None
    after: float | None = None
    held_out: float = 0.0  # its change on batches that were not fitted on, by the expansion

    def facts(self) -> dict[str, float | None]:
        """Return what the report says of it."""
        least, most = (f(self.scales.values(), default=1.0) for f in (min, max))
        return {
            "divergence_unscaled": self.before,
            "divergence_rescaled": self.after,
            "held_out_change": self.held_out,
            "least_scale": least,
            "greatest_scale": most,
        }


def rescale_batches(batches: Batches) -> list[dict[str, Tensor]]:
    """Return what scales are fitted on: beginnings of all that was calibrated on, evenly spread."""
    return probe_batches(batches, every=True, rows=ROWS)


@torch.no_grad()
def rescale(dense_outputs: Divergence, pruned: nn.Module, attn_unit: str = "auto") -> Rescaled:
    """Find scales that bring a sliced model nearer to the dense one; multiply its weights by them.

    Nothing is multiplied unless held-out batches, and all of them together, are nearer by it.
    ``dense_outputs`` are of few and small batches: outputs of all handles are held for one of them.
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
    """Return what can be scaled: a module for each layer of sites, and the last norm.

    Experts have none: what a layer of them gives is no output of one module's weights. A norm that
    follows a consumer takes its place: scaling its input changes nothing.
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
    """The divergence of a pruned model about its weights as they are, summed over some rows."""

    rows: int
    divergence: float  # of the model as it is
    slope: Tensor  # g, (handles,) float64
    curvature: Tensor  # H, (handles, handles) float64

    def change(self, step: Tensor) -> float:
        """Return what a step changes the divergence by."""
        return float(self.slope @ step + 0.5 * step @ self.curvature @ step)


def best_step(found: Sequence[Expansion]) -> tuple[float, float, Tensor | None]:
    """Return μ, the held-out change per row, and the step; None where none is better.

    Each batch is judged by what is fitted on all others.
    """
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
