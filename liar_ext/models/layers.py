"""The linear layers of a model, be they modules or slices of a parameter, and slices of these."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.models.family import Wiring
from liar_ext.system.errors import InputError

Shared = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by id and dimension: whole, sliced


def get_path(root: Any, path: str) -> Any:
    """Return the attribute of ``root`` at a dotted path."""
    return attrgetter(path)(root)


def has_path(root: Any, path: str, kind: type) -> bool:
    """Tell whether ``root`` has an attribute of this kind at a dotted path."""
    try:
        return isinstance(get_path(root, path), kind)
    except AttributeError:
        return False


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that has the parameter, buffer or number at a path, and its name there."""
    owner, _, name = path.rpartition(".")
    return root.get_submodule(owner), name


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module itself that its state dict holds."""
    both, dropped = {**module._parameters, **module._buffers}, module._non_persistent_buffers_set
    return {n: value for n, value in both.items() if value is not None and n not in dropped}


class ExpertLayer:
    """The linear layer of an expert: its slice of the parameters ``name`` and ``name_bias``."""

    def __init__(self, owner: nn.Module, name: str, expert: int) -> None:
        self.owner = owner
        biases = getattr(owner, bias_name(name), None)
        # Views: writing to them writes to the model.
        self.weight = getattr(owner, name)[expert]
        self.bias = None if biases is None else biases[expert]


class UnitColumns:
    """What several linear layers, or columns of one, read of the units of a site, as one layer.

    Its weight has the columns of all of them unit by unit; each layer keeps its own bias::

        W₁ of unit 0, W₂ of unit 0, W₁ of unit 1, ...        (d_out, site.d_in)
    """

    bias = None

    def __init__(self, root: nn.Module, site: Any) -> None:
        self.parts = [(root.get_submodule(path), *where) for path, *where in site.reads]
        self.d_in = site.d_in

    @property
    def weight(self) -> Tensor:
        """A copy; :meth:`filled` is for other values."""
        first = self.parts[0][0].weight.detach()
        found = first.new_empty(len(first), self.d_in)
        for layer, features, columns in self.parts:
            found[:, features] = layer.weight.detach()[:, columns]
        return found

    def filled(self, weight: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Return each layer with its weight, of which the columns of the units have new values."""
        both = []
        for layer, features, columns in self.parts:
            new = layer.weight.detach().clone()
            new[:, columns] = weight[:, features].to(new)
            both.append((layer, new))
        return both


def layer_of(root: nn.Module, site: Any) -> nn.Module | ExpertLayer | UnitColumns:
    """Return what reads the units of a site."""
    return UnitColumns(root, site) if site.shared else layer_at(root, site.consumer, site.expert)


def layer_at(root: nn.Module, path: str, expert: int | None) -> nn.Module | ExpertLayer:
    """Return the linear layer at a path: a module, or an expert's slice of a parameter there."""
    if expert is None:
        return root.get_submodule(path)
    return ExpertLayer(*owner_of(root, path), expert)


def bias_name(name: str) -> str:
    """Return what the biases of a layer of all experts are called."""
    return f"{name}_bias"


def out_in(site: str, path: str, layer: Any, wiring: Wiring) -> tuple[int, int]:
    """Return how many features a linear layer writes, and how many it reads."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            f"sites: {path} of {site} must be a linear layer with floating-point weights, got "
            f"{type(layer).__name__}; load the model dequantised"
        )
    kind = type(weight.data)  # another one is quantised (torchao), or split (FSDP)
    if kind is not Tensor or weight.dtype.itemsize < 2:
        raise InputError(
            f"sites: the weight of {path} of {site} must be an ordinary tensor of 16 bits or more, "
            f"got {kind.__name__} of {weight.dtype}; load the model dequantised and unsplit"
        )
    return tuple(weight.shape[::-1] if wiring.transposed else weight.shape)


def is_transposed(layer: nn.Module) -> bool:
    """Tell whether a layer stores its weight as (d_in, d_out)."""
    return type(layer).__name__ == "Conv1D"  # of transformers, which takes seconds to import


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (d_out, d_in), without a copy."""
    return layer.weight.T if is_transposed(layer) else layer.weight


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
