"""What a layer, one site or all experts of it, reads in a walk, and sums over that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch
from liar_ext.calibration.moments import Moments
from liar_ext.calibration.taps import is_relative, relative_weights
from liar_ext.models.experts import routed_input
from liar_ext.models.sites import Site
from liar_ext.reconstruction.ridge import Residual

Forward = Callable[..., Tensor]
# x̂, the residual r and what each token counts, bool or a number: a row per token.
Rows = tuple[Tensor, Tensor, Tensor]


@dataclass
class LayerSums:
    """Sums of x̂ and r over the tokens of one site, and how many tokens there were."""

    moments: Moments
    residual: Residual
    rows: int = 0

    @classmethod
    def zeros(cls, site: Site, device: torch.device) -> LayerSums:
        """Return the sums over no tokens."""
        residual = Residual.zeros(site.d_in, site.d_out, device=device)
        return cls(Moments.zeros(site.d_in, device=device), residual)

    def add(self, rows: Rows, fold: int) -> None:
        """Add tokens to a fold; those with a value that isn't finite are left out and counted."""
        (x, r, weight), moments = rows, self.moments
        self.rows += int((weight > 0).sum())
        x = x.to(r.dtype)
        usable = torch.isfinite(x).all(-1) & torch.isfinite(r).all(-1)
        moments.count[fold, 1] += (weight.bool() & ~usable).sum()
        moments.update(x, fold, weight * usable)
        self.residual.update(x, r, fold, weight * usable)


def rows_of(
    model: nn.Module,
    layer: Sequence[Site],
    read: Tensor | tuple[Tensor, Tensor, Tensor],
    residual: Tensor,
    used: Tensor,
) -> Iterator[Rows]:
    """Yield the rows of each site of a layer: of one site, or of all experts.

    ``read`` is what the consumer reads, or what the module of all experts is called with: tokens,
    chosen experts and their weights. ``residual`` is what the layer's output falls short by, a row
    per token, asked of all experts alike. ``used`` is what each counts, see :func:`counted`.
    """
    if layer[0].expert is None:
        yield read.flatten(0, -2), residual, used
        return
    _, _, given = read
    residual = residual / given.sum(-1, keepdim=True).to(residual)
    for site in layer:
        routed = routed_input(model, site, read)
        here = used[routed.token]
        asked = residual[routed.token][here]
        yield routed.x[here], asked, routed.weight[here].double().square()


def counted(
    batch: Batch, site: Site, tokens: int, output: Tensor, total: Tensor | None = None
) -> Tensor:
    """Return what each of ``tokens`` rows counts: 0 for padding, and 1 unless a norm follows.

    That divides by the size of what it reads, the ``output`` or the ``total`` of it and the stream;
    see :func:`liar_ext.calibration.taps.relative_weights`.
    """
    used = batch.counting(tokens, output.device, site.part.mask)
    if total is not None:
        return used * relative_weights(total.flatten(0, -2), centred=True)
    return used * relative_weights(output.flatten(0, -2)) if is_relative(site) else used


def layer_forward(model: nn.Module, layer: Sequence[Site], new: Mapping[str, Forward]) -> Forward:
    """Return what takes the place of a layer's consumer, or of the module of all experts."""
    if layer[0].expert is None:
        return new[layer[0].name]

    def experts(*args: Tensor) -> Tensor:
        total = torch.zeros_like(args[0])
        for site in layer:
            routed = routed_input(model, site, args)
            given = new[site.name](routed.x) * routed.weight[:, None]
            total.index_add_(0, routed.token, given.to(total.dtype))
        return total

    return experts
