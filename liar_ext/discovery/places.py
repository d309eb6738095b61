"""What a pass shows of the residual stream: tables, norms, linear layers, and who reads whom."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.discovery.blocks import Call, cloned, first_tensor
from liar_ext.discovery.instance import Refused
from liar_ext.discovery.tracing import stored

OFFSETS, NEAR = (0.0, 1.0), 1e-3  # what norms add to their weights; they compute in float32


@dataclass
class Place:
    """One module that a pass ran, as far as it has to do with the stream.

    Parameters
    ----------
    path : str
        In the model, or in the block.
    call : Call
        The run.
    kind : {"table", "norm", "linear", "parameters"}
        An embedding or a convolution; a norm over the features; a matrix product; a module with
        parameters of its own whose last dimension the features are.
    parameters : tuple of str
        Names of those.
    """

    path: str
    call: Call
    kind: str
    parameters: tuple[str, ...] = ()

    @property
    def input(self) -> Tensor | None:
        """The first tensor that it was given."""
        return first_tensor((self.call.args, self.call.kwargs))

    @property
    def shape(self) -> tuple[int, int]:
        """Features that it reads, and those that it puts out."""
        return self.input.shape[-1], self.call.output.shape[-1]


@dataclass
class Sources:
    """What the norms have put out so far, the last one last.

    Parameters
    ----------
    outputs : dict of str to Tensor
        By path of the norm in the model.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)

    def of(self, value: Tensor) -> tuple[str, bool] | None:
        """Return the norm that put a tensor out, and whether it is the first token's part of it."""
        for path, output in reversed(self.outputs.items()):
            if _equal(value, output):
                return path, False
            if output.ndim == 3 and _equal(value, output[:, 0]):
                return path, True
        return None


def place_of(path: str, call: Call, hidden: int) -> Place | None:
    """Return what a run of a module has to do with a stream of some size; None if nothing.

    Raises
    ------
    Refused
        If it is a norm that can't be made narrower.
    """
    module, output = call.module, call.output
    own = {n: p for n, p in module.named_parameters(recurse=False) if hidden in p.shape}
    if output is None:
        return None
    if not own:
        alone = next(module.parameters(), None) is None and next(module.children(), None) is None
        wide = output.shape[-1:] == (hidden,)
        return Place(path, call, "norm") if alone and wide and _mixes(call, hidden) else None
    weight = own.get("weight")
    if isinstance(module, nn.Embedding):
        wide = weight is not None and weight.shape[1] == hidden
        return Place(path, call, "table") if wide else None
    if weight is not None and weight.ndim == 2:
        given = first_tensor((call.args, call.kwargs))
        linear = given is not None and stored(module, given, output) is not None
        return Place(path, call, "linear") if linear else None
    if isinstance(module, nn.Conv2d) and len(weight) == hidden and module.groups == 1:
        return Place(path, call, "table")
    if any(p.ndim == 1 for p in own.values()) and _mixes(call, hidden):
        if weight is None or not own.keys() <= {"weight", "bias"}:
            names = " and ".join(own)
            raise Refused(f"{path} is a norm whose parameters are {names}, not weight and bias")
        if not call.args or not isinstance(call.args[0], Tensor):
            raise Refused(f"{path} gets the stream by keyword")
        return Place(path, call, "norm")
    names = tuple(name for name, each in own.items() if each.shape[-1] == hidden)
    return Place(path, call, "parameters", names) if names else None


def offset_of(place: Place) -> float | None:
    """Return what a norm adds to its weight before it scales by it: c of ``(w + c) n + b``.

    None of a norm without a weight.

    Raises
    ------
    Refused
        If what it puts out isn't of that form, with c one of :data:`OFFSETS`.
    """
    norm = copy.deepcopy(place.call.module)
    if getattr(norm, "weight", None) is None:
        return None
    bias = 0.0 if getattr(norm, "bias", None) is None else norm.bias

    def given(weight: float) -> Tensor:
        norm.weight.fill_(weight)
        return norm(*cloned(place.call.args), **cloned(place.call.kwargs)) - bias

    with torch.no_grad():
        none, one, two = given(0.0), given(1.0), given(2.0)
    slope, scale = one - none, float((one - none).abs().max()) + 1e-12
    for offset in OFFSETS:
        linear = float((two - one - slope).abs().max()) < NEAR * scale
        if linear and float((none - offset * slope).abs().max()) < NEAR * scale:
            return offset
    raise Refused(f"{place.path} doesn't scale what it puts out by its weight, or that and one")


def reads_features_of(reader: Place, writer: Place, run: Any) -> bool:
    """Tell whether a layer reads what another wrote, each feature by itself.

    ``run`` takes a layer and what is added to its output, and gives what the reader gets then.
    """
    output = writer.call.output
    before = run(writer.call.module, torch.zeros_like(output))
    if before.shape[-1] != output.shape[-1]:
        return False
    for feature in (0, output.shape[-1] - 1):
        move = torch.zeros_like(output)
        move[..., feature] = float(output.abs().max()) + 1.0
        changed = (run(writer.call.module, move) != before).reshape(-1, output.shape[-1]).any(0)
        if changed.nonzero().flatten().tolist() != [feature]:
            return False
    return reader.shape[0] == output.shape[-1]


def _mixes(call: Call, hidden: int) -> bool:
    """Tell whether one feature that a module reads changes others that it puts out."""
    if not call.args or not isinstance(call.args[0], Tensor) or call.args[0].shape[-1] != hidden:
        given = first_tensor(call.kwargs)
        weighted = next(call.module.parameters(), None) is not None
        return weighted and given is not None and given.shape == call.output.shape
    if call.output.shape != call.args[0].shape:
        return False
    args, kwargs = cloned(call.args), cloned(call.kwargs)
    args[0][..., 0] += float(args[0].abs().max()) + 1.0
    with torch.no_grad():
        after = first_tensor(call.module(*args, **kwargs))
    return bool((after - call.output)[..., 1:].abs().max() > 0)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())
