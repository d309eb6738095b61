"""Where the residual stream of a model is written, normalised and read, and how to narrow it.

Its features, the hidden size, are the same in every block, embeddings and heads included::

    writers   embeddings (columns); o, down, ... (rows)      lose features
    norms     RMSNorm, LayerNorm                             average over fewer features
    readers   q, k, v, gate, up, lm_head, ... (columns)      read what the norm before them puts out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.families import base_path, block_config, blocks_of, family_of
from liar_ext.wiring import Step

LayerWeights = Mapping[str, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Source:
    """The hidden features at one place, normalised, and the layers that read them there.

    Parameters
    ----------
    module : str
        Path of the norm whose output they are; without a norm, of the layer that reads them.
    norm : bool
        Whether it is a norm.
    first : bool
        Only the first token is read.
    readers : tuple of str
        Paths of linear layers with these features as their columns.
    tied : tuple of str
        Readers whose weight is the one of an embedding; not among ``readers``.
    """

    module: str
    norm: bool
    first: bool
    readers: tuple[str, ...]
    tied: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.module}[0]" if self.first else self.module


@dataclass(frozen=True)
class Hidden:
    """The hidden features of a model.

    Parameters
    ----------
    size : int
        How many there are.
    multiple_of : int
        What their number must be a multiple of, so that the stock class can be built.
    writers : tuple of str
        Paths of embeddings and linear layers.
    sources : tuple of Source
        Where they are read, in the order of computation.
    """

    size: int
    multiple_of: int
    writers: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms."""
        return tuple(source.module for source in self.sources if source.norm and not source.first)

    @property
    def solved(self) -> tuple[str, ...]:
        """Paths of the layers that can get new weights: norms, and readers that aren't tied."""
        return (*self.norms, *(path for source in self.sources for path in source.readers))


def hidden_of(model: nn.Module) -> Hidden:
    """Find the writers, norms and readers of a model's residual stream.

    Raises
    ------
    InputError
        If the family has no row for its stream, the row isn't for this config, or a layer has the
        hidden size and isn't in the row.
    """
    family = family_of(model)
    if family.stream is None:
        raise InputError(
            f"hidden: the table has no stream for family {family.name!r}; prune other sites, or "
            "register the family with a Stream"
        )
    config = block_config(family, model.config)
    for name, value in family.stream.requires.items():
        if getattr(config, name) != value:
            raise InputError(
                f"hidden: the stream of {family.name!r} is that of models with {name}={value}, got "
                f"{getattr(config, name)}; prune other sites, or register a family that fits"
            )
    base = base_path(model)
    layers = dict(model.named_modules())
    trail = _Trail(layers)
    for step in family.stream.start:
        trail.add(step.does, [base + name for name in step.layers])
    for path, _ in blocks_of(model, family):
        for step in family.stream.block:
            trail.add(step.does, [f"{path}.{name}" for name in step.layers])
    stream = trail.at
    for chain in family.stream.ends:
        trail.at = stream
        found = [_present(layers, base, step) for step in chain]
        if found[0]:
            for step, paths in zip(chain, found, strict=True):
                trail.add(step.does, paths)
    return trail.hidden(model, family.stream.multiple_of, config.num_attention_heads)


def _present(layers: Mapping[str, nn.Module], base: str, step: Step) -> list[str]:
    """Return the paths of those layers of a step that are in the base model or in the head."""
    # By the same name one head is a layer, and another one holds layers.
    return [
        path
        for name in step.layers
        for path in dict.fromkeys((base + name, name))
        if getattr(layers.get(path), "weight", None) is not None
    ]


class _Trail:
    """Collects what the steps of a stream say."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.writers: list[str] = []
        self.read: dict[tuple[str, bool], list[str]] = {}  # by source and whether the first token
        self.norms: list[str] = []
        self.at = ""

    def add(self, does: str, paths: list[str]) -> None:
        missing = [path for path in paths if path not in self.layers]
        if missing:
            raise InputError(
                f"hidden: the model has no layer {', '.join(missing)}; register a family that fits"
            )
        taken = {path for readers in self.read.values() for path in readers}
        free = [path for path in paths if path not in taken]
        if does == "write":
            self.writers += paths
        elif does == "norm":
            self.norms += paths
            for self.at in paths:
                self.read[self.at, False] = []
        elif does == "take":
            self.read |= {(path, False): [path] for path in free}
        elif free:
            self.read.setdefault((self.at, does == "read_first"), []).extend(free)

    def hidden(self, model: nn.Module, multiple_of: str | None, heads: int) -> Hidden:
        tables = [layer for path in self.writers if _is_table(layer := self.layers[path])]
        size, *others = sorted({table.weight.shape[1] for table in tables})
        if others:
            raise InputError(
                f"hidden: all embeddings must have the features of the stream, got {size} and "
                f"{others[0]}; prune other sites"
            )
        known = {*self.writers, *self.norms}.union(*self.read.values())
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            if size in parameter.shape and owner not in known:
                raise InputError(
                    f"hidden: {owner} of {type(model).__name__} has {size} features, and the "
                    "stream of the family doesn't name it; prune the base model, or register a "
                    "family that fits"
                )
        tied = {
            path
            for path in known
            if any(self.layers[path].weight is table.weight for table in tables)
        }
        sources = tuple(
            Source(
                module,
                norm=module in self.norms,
                first=first,
                readers=tuple(path for path in paths if path not in tied),
                tied=tuple(path for path in paths if path in tied),
            )
            for (module, first), paths in self.read.items()
        )
        step = {"heads": heads, "head_dim": size // heads, None: 1}[multiple_of]
        return Hidden(size, step, tuple(self.writers), sources)


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

    for path in hidden.norms:
        narrow_norm(model.get_submodule(path), index)
    for source in hidden.sources:
        for path in (*source.readers, *source.tied):
            keep(path, "weight", 1)
    for path, (weight, bias) in weights.items():
        layer = model.get_submodule(path)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    for path in hidden.writers:
        if _is_table(model.get_submodule(path)):
            # A tied head has been here already, and has sliced the weight of both.
            keep(path, "weight", 1)
        else:
            keep(path, "weight", 0)
            keep(path, "bias", 0)


def select(parameter: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    """Return a parameter that holds the given slices of another."""
    chosen = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(chosen.contiguous(), requires_grad=parameter.requires_grad)


def narrow_norm(norm: nn.Module, kept: Tensor) -> None:
    """Let a norm work on the features ``kept`` alone, in place; its statistic is theirs then."""
    for name in ("weight", "bias"):
        if getattr(norm, name, None) is not None:
            setattr(norm, name, select(getattr(norm, name), 0, kept))
    _fit(norm)


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _fit(layer: nn.Module) -> None:
    """Make the sizes that a layer keeps those of its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
