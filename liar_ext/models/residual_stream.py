"""Where the residual stream of a model is written, normalised and read, and how to narrow it.

Its features, the hidden size, are the same in every block, embeddings and heads included::

    writers   embeddings (columns); o, down, ... (rows)      lose features
    norms     RMSNorm, LayerNorm                             average over fewer features
    readers   q, k, v, gate, up, lm_head, ... (columns)      read what the norm before them puts out
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.models.family import DOES, Family, Step, Stream, steps
from liar_ext.models.layers import Shared, is_transposed, narrow, narrow_norm, owner_of, weight_of
from liar_ext.models.registry import family_of
from liar_ext.models.running import base_path, block_config, blocks_of
from liar_ext.models.sites import wiring_of
from liar_ext.system.errors import InputError

Layers = Mapping[str, nn.Module | nn.Parameter]  # by path
Weights = Mapping[str, tuple[Tensor, Tensor | None]]  # new ones, with the bias, by site or path


@dataclass(frozen=True)
class Source:
    """The hidden features at one place, normalised, and the layers that read them there."""

    module: str  # path of the norm whose output they are; without one, of the layer that reads them
    norm: bool  # whether it is a norm
    first: bool  # only the first token is read
    readers: tuple[str, ...]  # paths of linear layers with these features as their columns
    tied: tuple[str, ...]  # more of them, whose weight is the one of an embedding

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.module}[0]" if self.first else self.module


@dataclass(frozen=True)
class Hidden:
    """The hidden features of a model."""

    size: int
    multiple_of: int  # their number must be, so that the stock class can be built
    # Paths of embeddings, linear layers and convolutions, and of parameters by themselves, whose
    # last dimension the features are.
    writers: tuple[str, ...]
    sources: tuple[Source, ...]  # where they are read, in the order of computation

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms."""
        return tuple(source.module for source in self.sources if source.norm and not source.first)

    @property
    def solved(self) -> tuple[str, ...]:
        """Paths of the layers that can get new weights: norms, and readers that aren't tied."""
        return (*self.norms, *(path for source in self.sources for path in source.readers))


def stream_of(model: nn.Module) -> Stream | None:
    """Return the row of a model's residual stream, of alternatives the one that it has; or None."""
    family, base = family_of(model), base_path(model)
    if not isinstance(family.stream, tuple):
        return family.stream
    layers = dict(model.named_modules())
    return next(
        (row for row in family.stream if all(base + n in layers for n in row.start[0].layers)), None
    )


def hidden_of(model: nn.Module) -> Hidden:
    """Find the writers, norms and readers of a model's residual stream.

    InputError is raised if the family has no row for its stream, the row isn't for this config, or
    a layer has the hidden size and isn't in the row.
    """
    family, row = family_of(model), stream_of(model)
    config = block_config(family, model.config)
    _check_row(family, row, config)
    layers = {**dict(model.named_modules()), **dict(model.named_parameters())}
    writers: list[str] = []
    norms: list[str] = []
    aside: list[str] = []
    read: dict[tuple[str, bool], list[str]] = {}  # by source and whether the first token
    at, last = "", None  # the norm that was last, and the last one of all blocks
    for does, paths in _steps(model, family, row, layers):
        free = [path for path in paths if not any(path in some for some in read.values())]
        if does == "end":
            last = at if last is None else last
            at = last
        elif does == "write":
            writers += paths
        elif does in ("norm", "branch_norm"):
            new = [path for path in paths if path not in norms]  # several chains may begin so
            norms += new
            read |= {(path, False): [] for path in new}
            at = paths[-1] if paths and does == "norm" else at
        elif does == "aside":
            aside += paths
        elif does not in ("read", "read_first", "take"):
            raise InputError(f"hidden: a step may {', '.join(DOES)}, got {does!r}")
        elif free and (does == "take" or not at):
            read[free[0], False] = free
        elif free:
            read.setdefault((at, does == "read_first"), []).extend(free)
    tables = [layers[path] for path in writers if isinstance(layers[path], nn.Embedding)]
    alone = [layers[path] for path in writers if isinstance(layers[path], nn.Parameter)]
    sizes = {tensor.shape[-1] for tensor in (*alone, *(table.weight for table in tables))}
    size = min(sizes, default=0) or len(weight_of(layers[writers[0]]))
    readers = [path for paths in read.values() for path in paths]
    _check_size(model, layers, size, readers, {*writers, *norms, *aside, *readers})
    shared, sources = {id(table.weight) for table in tables}, []
    for (module, first), paths in read.items():
        tied = tuple(path for path in paths if id(layers[path].weight) in shared)
        own = tuple(path for path in paths if path not in tied)
        sources.append(Source(module, module in norms, first, own, tied))
    step = 1
    if row.multiple_of in ("heads", "head_dim"):
        heads = config.num_attention_heads
        step = heads if row.multiple_of == "heads" else size // heads
    return Hidden(size, step, tuple(writers), tuple(sources))


def _check_row(family: Family, row: Stream | None, config: Any) -> None:
    reason = f" ({family.without['hidden']})" if "hidden" in family.without else ""
    if row is None:
        raise InputError(
            f"hidden: the table has no stream for family {family.name!r}{reason}; prune other "
            "sites, or register the family with a Stream"
        )
    for name, value in row.requires.items():
        if (found := getattr(config, name)) != value:
            raise InputError(
                f"hidden: the stream of {family.name!r} is that of models with {name}={value}, got "
                f"{found}{reason}; prune other sites, or register a family that fits"
            )


def _steps(
    model: nn.Module, family: Family, row: Stream, layers: Layers
) -> Iterator[tuple[str, list[str]]]:
    """Yield what happens to a stream, and the paths of the layers that do it; "end" before each."""
    base = base_path(model)
    for step in row.start:
        paths = [base + name if base + name in layers else name for name in step.layers]
        yield _there(layers, step.does, paths)
    for path, block in blocks_of(model, family):
        for step in row.block:
            kinds = step.layers if step.does == "site" else ()
            found = (wiring_of(family.name, family.alternatives(kind), block) for kind in kinds)
            for does, names in steps(*filter(None, found)) if kinds else (step,):
                yield _there(layers, does, [f"{path}.{name}" for name in names])
    for chain in row.ends:
        found = [_present(layers, base, step) for step in chain]
        if found[0]:
            yield "end", []
            for step, paths in zip(chain, found, strict=True):
                yield step.does.removesuffix("_if"), paths


def _there(layers: Layers, does: str, paths: list[str]) -> tuple[str, list[str]]:
    """Return a step with those of its layers that are there; only ``..._if`` may lack some."""
    if does.endswith("_if"):
        return does.removesuffix("_if"), [path for path in paths if _weight(layers, path)]
    if missing := [path for path in paths if path not in layers]:
        raise InputError(
            f"hidden: the model has no layer {', '.join(missing)}; register a family that fits"
        )
    return does, paths


def _weight(layers: Layers, path: str) -> bool:
    layer = layers.get(path)
    return isinstance(layer, nn.Parameter) or getattr(layer, "weight", None) is not None


def _present(layers: Layers, base: str, step: Step) -> list[str]:
    """Return the paths of those layers of a step that are in the base model or in the head."""
    # By the same name one head is a layer, and another one holds layers.
    return [
        path
        for name in step.layers
        for path in dict.fromkeys((base + name, name))
        if _weight(layers, path) or (step.does == "norm" and path in layers)  # one without weights
    ]


def _check_size(
    model: nn.Module, layers: Layers, size: int, readers: Sequence[str], known: Collection[str]
) -> None:
    """Refuse layers of this size that no step names, and readers of another size."""
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        # The rows of a table are looked up by number: no feature of the stream is among them.
        features = parameter.shape[isinstance(layers.get(owner), nn.Embedding) :]
        if size in features and owner not in known and name not in known:
            raise InputError(
                f"hidden: {owner or name} of {type(model).__name__} has {size} features, as "
                "many as the stream, and the Stream of the family doesn't name it; prune the "
                "base model, or register a family whose Stream names it: as aside if it holds "
                "no feature of the stream, else by what it does"
            )
    for path in readers:
        if (columns := weight_of(layers[path]).shape[1]) != size:
            raise InputError(
                f"hidden: {path} of {type(model).__name__} reads {columns} features, and the "
                f"stream of the family has {size}; prune the base model"
            )


@torch.no_grad()
def slice_hidden(model: nn.Module, kept: Sequence[int], weights: Weights) -> None:
    """Keep some hidden features of a model, ascending, and remove the others, in place.

    ``weights`` are new weights and biases by path: ``(d_out, n_kept)`` of a reader, ``(n_kept,)``
    of a norm. Any other layer keeps the slices that it has.

    Notes
    -----
    A class that multiplies its embeddings by ``√hidden`` multiplies those that are left by
    ``√n_kept``. The table then takes the rest, ``√(hidden / n_kept)``, so that what is written to
    the stream stays what it was; the norm before a head that shares the table gives it back.
    """
    hidden = hidden_of(model)
    index = torch.tensor(kept, device="cpu")
    done: Shared = {}
    for path in hidden.norms:
        narrow_norm(model.get_submodule(path), index)
    for source in hidden.sources:
        for layer in map(model.get_submodule, (*source.readers, *source.tied)):
            narrow(layer, "weight", 0 if is_transposed(layer) else 1, index, done)
    for path, (weight, bias) in weights.items():
        layer = model.get_submodule(path)
        weight_of(layer).copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    for path in hidden.writers:
        owner, name = owner_of(model, path)
        if name in owner._parameters:
            narrow(owner, name, -1, index, done)
            continue
        layer = model.get_submodule(path)
        # A tied head has been at a table already, and has sliced the weight of both.
        columns = isinstance(layer, nn.Embedding) or is_transposed(layer)
        narrow(layer, "weight", 1 if columns else 0, index, done)
        narrow(layer, "bias", 0, index, done)
    if stream_of(model).scaled:
        _keep_scale(model, hidden, len(kept))


def _keep_scale(model: nn.Module, hidden: Hidden, count: int) -> None:
    """Let embeddings that are scaled by the root of the hidden size put out what they did."""
    (table,) = (m for m in map(model.get_submodule, hidden.writers) if isinstance(m, nn.Embedding))
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
