"""The lists of blocks of a model, and what each block was called with in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from liar_ext.models.running import base_path
from liar_ext.suggest.instance import Instance, Refused, outputs


@dataclass
class Call:
    """One run of a module: its arguments, and its first tensor out."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor | None = None

    @property
    def input(self) -> Tensor | None:
        """The first tensor that it was given."""
        return first_tensor((self.args, self.kwargs))


class Blocks(NamedTuple):
    """The path of a list of blocks inside the base model, and how the model called each of them."""

    path: str
    calls: list[Call]


cloned = partial(tree_map_only, Tensor, torch.clone)  # code may change arguments in place


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of what a module gave, or got."""
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    before: Callable | None = None,
    after: Callable | None = None,
) -> Iterator[None]:
    """Call these around each run of some modules, as torch's hooks, with the path in front."""
    with ExitStack() as hooks:
        for path, module in modules.items():
            if before is not None:
                hook = module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                hooks.callback(hook.remove)
            if after is not None:
                hooks.callback(module.register_forward_hook(partial(after, path)).remove)
        yield


def find_stacks(instance: Instance) -> list[Blocks]:
    """Return all lists of blocks of a model, in the order of computation.

    Raises
    ------
    Refused
        If there is none, or something is computed between blocks.
    """
    model, calls = instance.model, _calls(instance)
    found: dict[str, list[Call]] = {}
    broken = ""
    for path, container in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        children = list(container.children())
        if not isinstance(container, nn.ModuleList | nn.Sequential) or inside:
            continue
        if len(children) < 2 or not all(map(_holds_layers, children)):
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
    prefix = base_path(model)
    for path in found:
        if not path.startswith(prefix):
            raise Refused(f"its blocks, {path}, are outside of the base model")
    order = {id(call): index for index, call in enumerate(calls)}
    stacks = [Blocks(path.removeprefix(prefix), runs) for path, runs in found.items()]
    return sorted(stacks, key=lambda blocks: order[id(blocks.calls[0])])


def _calls(instance: Instance) -> list[Call]:
    """Return every run of a module in a forward pass, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []

    def before(_: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(Call(module, cloned(args), cloned(kwargs)))
        open_calls.append(calls[-1])

    def after(_: str, module: nn.Module, args: tuple, output: Any) -> None:
        open_calls.pop().output = cloned(first_tensor(output))

    with hooked(dict(instance.model.named_modules()), before, after):
        outputs(instance)
    return calls


def _holds_layers(module: nn.Module) -> bool:
    """Tell whether a module is more than one layer, and has weights that are matrices."""
    several = any(True for _ in module.children())
    return several and any(parameter.ndim >= 2 for parameter in module.parameters())


def _is_chain(runs: list[Call]) -> bool:
    """Tell whether each of some modules reads what the one before it put out."""
    return all(
        one.output is not None and read is not None and torch.equal(one.output, read)
        for one, read in zip(runs, (call.input for call in runs[1:]), strict=False)
    )
