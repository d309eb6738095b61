"""Where the residual stream of a model is written, normalised and read, and how to narrow it.

Its features, the hidden size, are the same in every block, embeddings and heads included::

    writers   embeddings (columns); o, down, ... (rows)      lose features
    norms     RMSNorm, LayerNorm                             average over fewer features
    readers   q, k, v, gate, up, lm_head, ... (columns)      read what the norm before them puts out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.models.family import Family, Step, Stream, steps
from liar_ext.models.registry import family_of
from liar_ext.models.running import base_path, block_config, blocks_of, owner_of
from liar_ext.models.sites import wiring_of
from liar_ext.system.errors import InputError

Shared = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by id and dimension: whole, sliced
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
    _check_row(model, family, row)
    base = base_path(model)
    layers = {**dict(model.named_modules()), **dict(model.named_parameters())}
    trail = _Trail(layers)
    for step in row.start:
        paths = [base + name if base + name in layers else name for name in step.layers]
        trail.add(step.does, paths)
    for path, block in blocks_of(model, family):
        for step in _spelled_out(row.block, family, block):
            trail.add(step.does, [f"{path}.{name}" for name in step.layers])
    stream = trail.at
    for chain in row.ends:
        trail.at = stream
        found = [_present(layers, base, step) for step in chain]
        if found[0]:
            for step, paths in zip(chain, found, strict=True):
                trail.add(step.does, paths)
    ruled = row.multiple_of in ("heads", "head_dim")
    heads = block_config(family, model.config).num_attention_heads if ruled else 1
    return trail.hidden(model, row.multiple_of, heads)


def _check_row(model: nn.Module, family: Family, row: Stream | None) -> None:
    reason = f" ({family.without['hidden']})" if "hidden" in family.without else ""
    if row is None:
        raise InputError(
            f"hidden: the table has no stream for family {family.name!r}{reason}; prune other "
            "sites, or register the family with a Stream"
        )
    config = block_config(family, model.config)
    for name, value in row.requires.items():
        if getattr(config, name) != value:
            raise InputError(
                f"hidden: the stream of {family.name!r} is that of models with {name}={value}, got "
                f"{getattr(config, name)}{reason}; prune other sites, or register a family that "
                "fits"
            )
    if row.scaled and not hasattr(model.get_input_embeddings(), "scalar_embed_scale"):
        raise InputError(
            f"hidden: the embeddings of {type(model).__name__} must keep the root of the hidden "
            "size as scalar_embed_scale, and these don't; update transformers"
        )


def _spelled_out(chain: Sequence[Step], family: Family, block: nn.Module) -> Iterator[Step]:
    """Yield steps with those of the sites that a block has in place of their names."""
    for step in chain:
        if step.does != "site":
            yield step
            continue
        for kind in step.layers:
            if wiring := wiring_of(family.name, family.alternatives(kind), block):
                yield from steps(wiring)


def _present(layers: Mapping[str, nn.Module], base: str, step: Step) -> list[str]:
    """Return the paths of those layers of a step that are in the base model or in the head."""
    # By the same name one head is a layer, and another one holds layers.
    return [
        path
        for name in step.layers
        for path in dict.fromkeys((base + name, name))
        if getattr(layers.get(path), "weight", None) is not None
        or (step.does == "norm" and path in layers)  # one may have no weights
    ]


class _Trail:
    """Collects what the steps of a stream say of ``layers``, modules and parameters by path."""

    def __init__(self, layers: Mapping[str, nn.Module | nn.Parameter]) -> None:
        self.layers = layers
        self.writers: list[str] = []
        self.read: dict[tuple[str, bool], list[str]] = {}  # by source and whether the first token
        self.norms: list[str] = []
        self.aside: list[str] = []
        self.at = ""

    def add(self, does: str, paths: list[str]) -> None:
        if does.endswith("_if"):
            does, paths = does.removesuffix("_if"), [path for path in paths if self._there(path)]
        missing = [path for path in paths if path not in self.layers]
        if missing:
            raise InputError(
                f"hidden: the model has no layer {', '.join(missing)}; register a family that fits"
            )
        taken = set().union(*self.read.values())
        free = [path for path in paths if path not in taken]
        if does == "write":
            self.writers += paths
        elif does in ("norm", "branch_norm"):
            new = [path for path in paths if path not in self.norms]  # several chains may begin so
            self.norms += new
            self.read |= {(path, False): [] for path in new}
            if does == "norm":
                self.at = (self.at, *paths)[-1]
        elif does == "aside":
            self.aside += paths
        elif free and (does == "take" or not self.at):
            self.read[free[0], False] = free
        elif free:
            self.read.setdefault((self.at, does == "read_first"), []).extend(free)

    def _there(self, path: str) -> bool:
        layer = self.layers.get(path)
        return isinstance(layer, nn.Parameter) or getattr(layer, "weight", None) is not None

    def hidden(self, model: nn.Module, multiple_of: str | None, heads: int) -> Hidden:
        writers = [self.layers[path] for path in self.writers]
        tables = [layer for layer in writers if isinstance(layer, nn.Embedding)]
        alone = [layer for layer in writers if isinstance(layer, nn.Parameter)]
        found = {tensor.shape[-1] for tensor in (*alone, *(table.weight for table in tables))}
        size, *others = sorted(found) or [len(weight_of(writers[0]))]
        if others:
            raise InputError(
                f"hidden: all embeddings must have the features of the stream, got {size} and "
                f"{others[0]}; prune other sites"
            )
        self._check(model, size)
        sources, shared = [], {id(table.weight) for table in tables}
        for (module, first), paths in self.read.items():
            tied = tuple(path for path in paths if id(self.layers[path].weight) in shared)
            readers = tuple(path for path in paths if path not in tied)
            sources.append(Source(module, module in self.norms, first, readers, tied))
        step = {"heads": heads, "head_dim": size // heads}.get(multiple_of, 1)
        return Hidden(size, step, tuple(self.writers), tuple(sources))

    def _check(self, model: nn.Module, size: int) -> None:
        """Refuse layers of this size that no step names, and readers of another size."""
        known = {*self.writers, *self.norms, *self.aside}.union(*self.read.values())
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            # The rows of a table are looked up by number: no feature of the stream is among them.
            is_table = isinstance(self.layers.get(owner), nn.Embedding)
            features = parameter.shape[is_table:]
            if size in features and known.isdisjoint((owner, name)):
                raise InputError(
                    f"hidden: {owner or name} of {type(model).__name__} has {size} features, as "
                    "many as the stream, and the Stream of the family doesn't name it; prune the "
                    "base model, or register a family whose Stream names it: as aside if it holds "
                    "no feature of the stream, else by what it does"
                )
        for path in set().union(*self.read.values()):
            if (columns := weight_of(self.layers[path]).shape[1]) != size:
                raise InputError(
                    f"hidden: {path} of {type(model).__name__} reads {columns} features, and the "
                    f"stream of the family has {size}; prune the base model"
                )


def is_transposed(layer: nn.Module) -> bool:
    """Tell whether a layer stores its weight as (d_in, d_out)."""
    return type(layer).__name__ == "Conv1D"  # of transformers, which takes seconds to import


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (d_out, d_in), without a copy."""
    return layer.weight.T if is_transposed(layer) else layer.weight


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


def select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return a parameter, or buffer, that holds the given slices of another.

    ``index`` is (kept,), or (experts, kept) for slices of their own of each expert, whose number
    is the first dimension then.
    """
    old, index = tensor.detach(), index.to(tensor.device)
    if index.ndim == 1:
        chosen = old.index_select(dim, index)
    else:
        parts = zip(old, index, strict=True)
        chosen = torch.stack([part.index_select(dim - 1, rows) for part, rows in parts])
    if not isinstance(tensor, nn.Parameter):
        return chosen
    return nn.Parameter(chosen.contiguous(), requires_grad=tensor.requires_grad)


def narrow(
    module: nn.Module, name: str, dim: int, index: Tensor, shared: Shared | None = None
) -> None:
    """Let a parameter or buffer of a module, if there is one, hold slices of itself, in place.

    ``shared`` notes what was sliced, so that a weight that two modules share stays shared.
    """
    old, shared = getattr(module, name, None), {} if shared is None else shared
    if old is None:
        return
    if (id(old), dim) not in shared:  # the old one is held there, so that its id stays its own
        shared[id(old), dim] = old, select(old, dim, index)
    setattr(module, name, shared[id(old), dim][1])
    fit(module)


def narrow_norm(norm: nn.Module, kept: Tensor) -> None:
    """Let a norm work on the features ``kept`` alone, in place; its statistic is theirs then."""
    narrow(norm, "weight", 0, kept)
    narrow(norm, "bias", 0, kept)
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (len(kept),)


def fit(layer: nn.Module) -> None:
    """Make the sizes that a layer keeps those of its weight."""
    if isinstance(layer, nn.Conv1d):  # a filter for each channel
        layer.in_channels = layer.out_channels = layer.groups = len(layer.weight)
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels = len(layer.weight)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif is_transposed(layer):
        layer.nx, layer.nf = layer.weight.shape
    elif hasattr(layer, "out_features"):
        layer.out_features, layer.in_features = layer.weight.shape
