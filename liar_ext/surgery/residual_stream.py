"""Keep some features of the residual stream: slice what writes, norms and reads it, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from liar_ext.models.residual_stream import (
    Hidden,
    hidden_of,
    is_table,
    is_transposed,
    stream_of,
    weight_of,
)

LayerWeights = Mapping[str, tuple[Tensor, Tensor | None]]


@torch.no_grad()
def slice_hidden(model: nn.Module, kept: Sequence[int], weights: LayerWeights) -> None:
    """Keep some hidden features of a model and remove the others, in place.

    Parameters
    ----------
    model : nn.Module
        The model.
    kept : sequence of int
        Features that stay, ascending.
    weights : mapping of str to (Tensor, Tensor or None)
        New weight and bias by path: ``(d_out, n_kept)`` of a reader, ``(n_kept,)`` of a norm. Any
        other layer keeps the slices that it has.

    Notes
    -----
    A class that multiplies its embeddings by ``√hidden`` multiplies those that are left by
    ``√n_kept``. The table then takes the rest, ``√(hidden / n_kept)``, so that what is written to
    the stream stays what it was; the norm before a head that shares the table gives it back.
    """
    hidden = hidden_of(model)
    index = torch.tensor(kept, device="cpu")
    done: dict[tuple[int, int], tuple[nn.Parameter, nn.Parameter]] = {}

    def keep(path: str, name: str, dim: int) -> None:
        layer = model.get_submodule(path)
        old = getattr(layer, name, None)
        if old is None:
            return
        if (id(old), dim) not in done:
            done[id(old), dim] = (old, select(old, dim, index))
        # A weight that two layers share stays shared. Held here, the old one keeps its id its own.
        setattr(layer, name, done[id(old), dim][1])
        _fit(layer)

    def dim_of(path: str, dim: int) -> int:
        """Return which dimension of a weight is that one of (d_out, d_in)."""
        return 1 - dim if is_transposed(model.get_submodule(path)) else dim

    for path in hidden.norms:
        narrow_norm(model.get_submodule(path), index)
    for source in hidden.sources:
        for path in (*source.readers, *source.tied):
            keep(path, "weight", dim_of(path, 1))
    for path, (weight, bias) in weights.items():
        layer = model.get_submodule(path)
        weight_of(layer).copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    for path in hidden.writers:
        owner, _, name = path.rpartition(".")
        if name in model.get_submodule(owner)._parameters:
            keep(owner, name, -1)
        elif is_table(model.get_submodule(path)):
            # A tied head has been here already, and has sliced the weight of both.
            keep(path, "weight", 1)
        else:
            keep(path, "weight", dim_of(path, 0))
            keep(path, "bias", 0)
    if stream_of(model).scaled:
        _keep_scale(model, hidden, len(kept))


def _keep_scale(model: nn.Module, hidden: Hidden, count: int) -> None:
    """Let embeddings that are scaled by the root of the hidden size put out what they did."""
    (table,) = (m for m in map(model.get_submodule, hidden.writers) if is_table(m))
    # Rounded as its forward rounds them.
    dtype = table.weight.dtype
    scales = torch.tensor([table.scalar_embed_scale, count**0.5], device="cpu").to(dtype).double()
    table.scalar_embed_scale = count**0.5
    table.embed_scale = torch.full_like(table.embed_scale, table.scalar_embed_scale)
    factor = float(scales[0] / scales[1])
    if factor == 1.0:
        return
    table.weight.mul_(factor)
    added = stream_of(model).norm_offset
    for norm in (model.get_submodule(source.module) for source in hidden.sources if source.tied):
        norm.weight.copy_((norm.weight.double() + added) / factor - added)


def select(parameter: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    """Return a parameter that holds the given slices of another."""
    chosen = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(chosen.contiguous(), requires_grad=parameter.requires_grad)


def narrow_norm(norm: nn.Module, kept: Tensor) -> None:
    """Let a norm work on the features ``kept`` alone, in place; its statistic is theirs then."""
    for name in ("weight", "bias"):
        if getattr(norm, name, None) is not None:
            setattr(norm, name, select(getattr(norm, name), 0, kept))
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (len(kept),)


def _fit(layer: nn.Module) -> None:
    """Make the sizes that a layer keeps those of its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels = len(layer.weight)
    elif is_transposed(layer):
        layer.nx, layer.nf = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
