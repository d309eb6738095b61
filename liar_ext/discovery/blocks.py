"""Find the list of blocks: modules that a forward pass goes through, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.discovery.instance import Instance, Refused, outputs
from liar_ext.models.reading import base_path


@dataclass
class Call:
    """One run of a module: its arguments, and its first tensor out."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor | None = None


@dataclass
class Blocks:
    """The blocks of a model.

    Parameters
    ----------
    path : str
        Of the list, inside the base model.
    calls : list of Call
        How the model called each of them.
    """

    path: str
    calls: list[Call] = field(repr=False)


def find_blocks(instance: Instance) -> Blocks:
    """Return the one list of blocks of a model.

    Raises
    ------
    Refused
        If there is none or there are several, or something is computed between blocks.
    """
    found = find_stacks(instance)
    if len(found) > 1:
        prefix = base_path(instance.model)
        names = ", ".join(prefix + blocks.path for blocks in found)
        raise Refused(f"there are several lists of blocks: {names}")
    return found[0]


def find_stacks(instance: Instance) -> list[Blocks]:
    """Return all lists of blocks of a model, in the order of computation.

    Raises
    ------
    Refused
        If there is none, or something is computed between blocks.
    """
    model = instance.model
    calls = watch(instance)
    found: dict[str, list[Call]] = {}
    broken = ""
    for path, container in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        children = list(container.children())
        if not isinstance(container, nn.ModuleList | nn.Sequential) or inside:
            continue
        if len(children) < 2 or not all(_holds_layers(child) for child in children):
            continue
        runs = [[call for call in calls if call.module is child] for child in children]
        if not any(runs):
            continue  # of another input than tokens, such as images
        if any(len(each) != 1 for each in runs):
            broken = broken or f"not every module of {path} runs exactly once"
        elif not _is_chain([each[0] for each in runs]):
            broken = broken or f"modules of {path} don't read what the one before put out"
        else:
            found[path] = [each[0] for each in runs]
    if not found:
        raise Refused(broken or "there is no list of blocks that run one after another")
    prefix, order = base_path(model), {id(call): index for index, call in enumerate(calls)}
    for path in found:
        if not path.startswith(prefix):
            raise Refused(f"its blocks, {path}, are outside of the base model")
    stacks = [Blocks(path.removeprefix(prefix), runs) for path, runs in found.items()]
    return sorted(stacks, key=lambda blocks: order[id(blocks.calls[0])])


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of what a module gave, or got."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | tuple | list):
        return next((t for t in map(first_tensor, values) if t is not None), None)
    return None


def cloned(value: Any) -> Any:
    """Return arguments with copies of their tensors, which code may change in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(cloned, value))
    return {key: cloned(each) for key, each in value.items()} if type(value) is dict else value


def watch(instance: Instance) -> list[Call]:
    """Return every run of a module in a forward pass, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = Call(module, cloned(args), cloned(kwargs))
        calls.append(call)
        open_calls.append(call)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        open_calls.pop().output = cloned(first_tensor(output))

    handles = []
    for module in instance.model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        outputs(instance.model, instance.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _holds_layers(module: nn.Module) -> bool:
    """Tell whether a module is more than one layer, and has weights that are matrices."""
    several = any(True for _ in module.children())
    return several and any(parameter.ndim >= 2 for parameter in module.parameters())


def _is_chain(runs: list[Call]) -> bool:
    for one, following in zip(runs, runs[1:], strict=False):
        read = first_tensor((following.args, following.kwargs))
        if one.output is None or read is None or one.output.shape != read.shape:
            return False
        if not torch.equal(one.output, read):
            return False
    return True
