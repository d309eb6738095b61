"""What other modules of a block get to see while its linear layers are held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.discovery.blocks import first_tensor
from liar_ext.discovery.tracing import Trace
from liar_ext.models.family import HeadInput

Look = Callable[[str, nn.Module, tuple, dict[str, Any]], None]
See = Callable[[str, Any], None]
LARGE = (1e3, 1e6)  # times an output, so that what a norm adds to a mean square is nothing
ROUNDING = 1e-5  # many norms compute in float32


def mixers(trace: Trace, producers: Iterable[str]) -> list[str]:
    """Return the modules without matrices that read outputs of some layers, such as norms."""
    inner, found = _without_matrices(trace), set()
    for producer in producers:
        layer = trace.layers[producer]
        still = _first_inputs(trace, inner, producer, torch.zeros_like(layer.output))
        moved = _first_inputs(trace, inner, producer, trace.noise(layer.output))
        found |= {n for n in still.keys() & moved.keys() if not torch.equal(still[n], moved[n])}
    return sorted(found)


def norm_after(trace: Trace, consumer: str) -> str:
    """Return the norm that reads what a layer gives, and that alone; empty if none does.

    Then the norm and the block put out the same whatever large factor that gets.
    """
    output = trace.layers[consumer].output
    if not _same(*(trace.run(consumer, factor * output, lambda *_: None) for factor in LARGE)):
        return ""
    inputs = _first_inputs(trace, _without_matrices(trace), None, torch.zeros(()))
    for name, read in inputs.items():
        if torch.equal(read.flatten(), output.flatten()):
            module = trace.block.get_submodule(name)  # or a dropout before it, which scales along
            with suppress(TypeError):  # a module that takes more than one tensor is none
                if _same(*(module(factor * read) for factor in LARGE)):
                    return name
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= ROUNDING * float(one.abs().max())


def _without_matrices(trace: Trace) -> list[str]:
    return [
        name
        for name, module in trace.block.named_modules()
        if name and name not in trace.layers and next(module.children(), None) is None
    ]


def fed_by(trace: Trace, names: list[str], producer: str | None) -> set[str]:
    """Return the modules whose input changes with a layer's output, or None's: the block's input.

    All other layers are held.
    """
    like = first_tensor((trace.call.args, trace.call.kwargs))
    if producer is not None:
        like = trace.layers[producer].output
    still = _first_inputs(trace, names, None, torch.zeros(()))
    moved = _first_inputs(trace, names, producer, trace.noise(like))
    return {name for name in still if not torch.equal(still[name], moved[name])}


def input_by_head(trace: Trace, consumer: str, heads: int, first: nn.Module) -> HeadInput | None:
    """Return the argument with a slice a head that comes into a block, if there is one.

    It is (batch, heads, queries, keys), such as a bias of relative positions. Where a module passes
    it on to the next block, the one of ``first``, the first block, has made it: of a table with a
    column a head, or by itself.
    """
    found: list[tuple[HeadInput, Tensor]] = []
    passed: dict[str, int] = {}

    def look(path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            sliced = isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == heads > 1
            if sliced and name in names:
                found.append((HeadInput(path, names.index(name), name), value))

    def see(path: str, output: Any) -> None:
        mine = [value for each, value in found if each.module == path]
        if mine and isinstance(output, tuple):
            same = [i for i, value in enumerate(output) if value is mine[-1]]
            passed.update({path: same[0]} if same else {})

    around = [name for name, _ in trace.block.named_modules() if consumer.startswith(f"{name}.")]
    with _looking(trace.block, around, look, see):
        trace.run(None, torch.zeros(()), lambda name, value: None)
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
    table = tables[0] if tables else ""
    output = passed[head_input.module]
    return replace(head_input, output=output, table=table, own=not table)


def _first_inputs(
    trace: Trace, names: list[str], producer: str | None, move: Tensor
) -> dict[str, Tensor]:
    """Return what modules read while one layer, or what came in, is something else."""
    inputs: dict[str, Tensor] = {}

    def look(path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[path] = args[0].clone()

    with _looking(trace.block, names, look):
        trace.run(producer, move, lambda name, value: None)
    return inputs


@contextmanager
def _looking(
    block: nn.Module, names: list[str], look: Look, see: See | None = None
) -> Iterator[None]:
    """Call a function with path, module and arguments of every run of some modules.

    Another one, if there is one, gets path and output.
    """

    def watch(path: str) -> Any:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            look(path, module, args, kwargs)

        return block.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)

    def watch_output(path: str) -> Any:
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            see(path, output)

        return block.get_submodule(path).register_forward_hook(after)

    handles = [watch(name) for name in names]
    handles += [watch_output(name) for name in names if see is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
