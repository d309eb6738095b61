"""What modules between the linear layers of a block read while those are held."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.models.family import HeadInput
from liar_ext.suggest.trace import Trace

LARGE = (1e3, 1e6)  # times an output, so that what a norm adds to a mean square is nothing
ROUNDING = 1e-5  # many norms compute in float32


def mixers(trace: Trace, producers: Iterable[str]) -> list[str]:
    """Return the modules without matrices that read outputs of some layers, such as norms."""
    found = set()
    for producer in producers:
        output = trace.layers[producer].output
        still, moved = (
            _inputs(trace, producer, by) for by in (torch.zeros_like(output), trace.noise(output))
        )
        found |= {n for n in still.keys() & moved.keys() if not torch.equal(still[n], moved[n])}
    return sorted(found)


def norm_after(trace: Trace, consumer: str) -> str:
    """Return the norm that reads what a layer gives, and that alone; empty if none does.

    Then the norm and the block put out the same whatever large factor that gets.
    """
    output = trace.layers[consumer].output
    if not _same(*(trace.run(consumer, factor * output) for factor in LARGE)):
        return ""
    for name, read in _inputs(trace, None, None).items():
        if torch.equal(read.flatten(), output.flatten()):
            module = trace.block.get_submodule(name)  # or a dropout before it, which scales along
            with suppress(TypeError):  # a module that takes more than one tensor is none
                if _same(*(module(factor * read) for factor in LARGE)):
                    return name
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= ROUNDING * float(one.abs().max())


def input_by_head(trace: Trace, consumer: str, heads: int, first: nn.Module) -> HeadInput | None:
    """Return the argument with a slice a head that comes into a block, if there is one.

    It is (batch, heads, queries, keys), such as a bias of relative positions. Where a module passes
    it on to the next block, the one of ``first``, the first block, has made it: of a table with a
    column a head, or by itself.
    """
    found: list[tuple[HeadInput, Tensor]] = []
    passed: dict[str, int] = {}

    def watch(path: str) -> list[Any]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            names = list(inspect.signature(module.forward).parameters)
            for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
                sliced = isinstance(value, Tensor) and value.ndim == 4
                if sliced and value.shape[1] == heads > 1 and name in names:
                    found.append((HeadInput(path, names.index(name), name), value))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            mine = [value for each, value in found if each.module == path]
            if mine and isinstance(output, tuple):
                same = [i for i, value in enumerate(output) if value is mine[-1]]
                passed.update({path: same[0]} if same else {})

        module = trace.block.get_submodule(path)
        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    with ExitStack() as hooks:
        for name, _ in trace.block.named_modules():
            for hook in watch(name) if consumer.startswith(f"{name}.") else ():
                hooks.callback(hook.remove)
        trace.run(None, None)
    if not found:
        return None
    head_input = found[-1][0]
    if head_input.module not in passed:
        return head_input
    tables = [
        name
        for name, child in first.get_submodule(head_input.module).named_children()
        if isinstance(child, nn.Embedding) and child.weight.shape[1] == heads
    ]
    table, output = tables[0] if tables else "", passed[head_input.module]
    return replace(head_input, output=output, table=table, own=not table)


def _inputs(trace: Trace, producer: str | None, move: Tensor | None) -> dict[str, Tensor]:
    """Return what modules without matrices read while one layer, if any, puts out another."""
    inputs: dict[str, Tensor] = {}

    def watch(path: str, module: nn.Module) -> Any:
        def before(_: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[path] = args[0].clone()

        return module.register_forward_pre_hook(before)

    with ExitStack() as hooks:
        for name, module in trace.block.named_modules():
            if name and name not in trace.layers and next(module.children(), None) is None:
                hooks.callback(watch(name, module).remove)
        trace.run(producer, move)
    return inputs
