"""Which block reads which, and in a block which linear layer reads which.

A block runs by itself with what the model gave it. All linear layers put out what they did in
that pass, but for one output that is NaN, which those alone read that do so through no other linear
layer::

    row r of P is NaN  ──▶  norm, rotation, softmax, activation, product  ──▶  columns of C are NaN
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from liar_ext.models.family import HeadInput
from liar_ext.suggest.instance import Instance, Refused, outputs

MOST_ROWS = 4000  # of all layers that a consumer reads: a second of small blocks
TOKEN = 2  # whose outputs are moved: others come before it and after it
LARGE = (1e3, 1e6)  # times an output, so that what a norm adds to a mean square is nothing
ROUNDING = 1e-5  # many norms compute in float32
cloned = partial(tree_map_only, Tensor, torch.clone)  # code may change arguments in place


@dataclass
class Call:
    """One run of a module: its arguments, and its first tensor out."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor | None = None


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of what a module gave, or got."""
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], before: Callable | None = None, after: Callable | None = None
) -> Iterator[None]:
    """Call these around each run of some modules, as torch's hooks, with the path in front."""
    with ExitStack() as hooks:
        for path, module in modules.items():
            if before is not None:
                hook = module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                hooks.enter_context(hook)
            if after is not None:
                hooks.enter_context(module.register_forward_hook(partial(after, path)))
        yield


def find_stacks(instance: Instance) -> dict[str, list[Call]]:
    """Return how a model called its blocks, by the path of each list of them in the base model.

    Lists are in the order of computation.
    """
    calls = _calls(instance)
    found: dict[str, list[Call]] = {}
    broken = ""
    for path, container in getattr(instance.model, "base_model", instance.model).named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        children = list(container.children())
        if not isinstance(container, nn.ModuleList | nn.Sequential) or inside:
            continue
        if len(children) < 2 or not all(map(_holds_layers, children)):
            continue
        runs = [[call for call in calls if call.module is child] for child in children]
        if not any(runs):
            continue  # of another input than tokens, such as images
        if all(len(each) == 1 for each in runs) and _is_chain([each[0] for each in runs]):
            found[path] = [each[0] for each in runs]
        else:
            broken = broken or f"modules of {path} don't read, once each, what the one before gives"
    if not found:
        raise Refused(broken or "there is no list of blocks that run one after another")
    order = {id(call): index for index, call in enumerate(calls)}
    return dict(sorted(found.items(), key=lambda item: order[id(item[1][0])]))


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
    reads = (first_tensor((call.args, call.kwargs)) for call in runs[1:])
    return all(
        one.output is not None and read is not None and torch.equal(one.output, read)
        for one, read in zip(runs, reads, strict=False)
    )


class Layer(NamedTuple):
    """A linear layer ``W x + b`` as a pass has seen it; ``transposed``: W is (d_in, d_out)."""

    module: nn.Module
    transposed: bool
    input: Tensor
    output: Tensor


class Reach(NamedTuple):
    """Where one output of a layer arrives: columns of a consumer, and whether at its token only."""

    columns: tuple[int, ...]
    local: bool


class Trace:
    """A block, and how its linear layers depend on one another."""

    def __init__(self, call: Call) -> None:
        self.block, self.call = call.module, call
        self._modules = dict(call.module.named_modules())
        self.layers: dict[str, Layer] = {}  # by path, but for those that ran repeatedly
        self.ran: set[str] = set()  # all modules that did
        self._find_layers()
        # What each layer reads through no other, and those that read what comes into the block.
        self.parents: dict[str, list[str]] = {name: [] for name in self.layers}
        for name in self.layers:
            for reader in self._reading(name, self.layers):
                self.parents[reader].append(name)
        self.readers = self._reading(None, self.layers)

    def reaches(self, consumer: str) -> dict[str, list[Reach]]:
        """Return what each layer that a consumer reads reaches, row by row."""
        counts = {parent: self.layers[parent].output.shape[-1] for parent in self.parents[consumer]}
        if (rows := sum(counts.values())) > MOST_ROWS:
            raise Refused(f"{consumer} reads {rows:,} rows: the config can't be made smaller")
        found: dict[str, list[Reach]] = {parent: [] for parent in counts}
        for parent, count in counts.items():
            for row in range(count):
                hit = self._read(consumer, parent, row, math.nan).isnan().flatten(0, -2)
                columns, tokens = (hit.any(at).nonzero().flatten().tolist() for at in (0, 1))
                found[parent].append(Reach(tuple(columns), tokens in ([], [TOKEN])))
        return found

    def is_linear_in(self, producer: str, row: int, consumer: str) -> bool:
        """Tell whether a consumer's input is a linear function of one output of a layer."""
        before = self.layers[consumer].input
        once, twice = (self._read(consumer, producer, row, by) - before for by in (1.0, 2.0))
        return bool(torch.allclose(twice, 2 * once, rtol=1e-6, atol=1e-9))

    def mixers(self, producers: Iterable[str]) -> list[str]:
        """Return the modules without matrices that read outputs of some layers, such as norms."""
        found = {name for producer in producers for name in self._reading(producer)}
        return sorted(found - self.layers.keys())

    def norm_after(self, consumer: str) -> str:
        """Return the norm that reads what a layer gives, and that alone; empty if none does.

        Then the norm and the block put out the same whatever large factor that gets.
        """
        output = self.layers[consumer].output
        if not _same(*(self._run(consumer, factor * output) for factor in LARGE)):
            return ""
        for name, read in self._inputs(None, 0.0).items():
            if name not in self.layers and torch.equal(read.flatten(), output.flatten()):
                module = self._modules[name]  # or a dropout before it, which scales along
                with suppress(TypeError):  # a module that takes more than one tensor is none
                    if _same(*(module(factor * read) for factor in LARGE)):
                        return name
        return ""

    def input_by_head(self, consumer: str, heads: int, first: nn.Module) -> HeadInput | None:
        """Return the argument with a slice a head that comes into a block, if there is one.

        It is (batch, heads, queries, keys), such as a bias of relative positions. Where a module
        passes it on to the next block, the one of ``first``, the first block, has made it: of a
        table with a column a head, or by itself.
        """
        found: list[tuple[HeadInput, Tensor]] = []
        passed: dict[str, int] = {}

        def before(path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            names = list(inspect.signature(module.forward).parameters)
            for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
                sliced = isinstance(value, Tensor) and value.ndim == 4
                if sliced and value.shape[1] == heads > 1 and name in names:
                    found.append((HeadInput(path, names.index(name), name), value))

        def after(path: str, module: nn.Module, args: tuple, output: Any) -> None:
            mine = [value for each, value in found if each.module == path][-1:]
            for at, value in enumerate(output if isinstance(output, tuple) else ()):
                if mine and value is mine[0]:
                    passed.setdefault(path, at)

        around = {n: m for n, m in self._modules.items() if consumer.startswith(f"{n}.")}
        with hooked(around, before, after):
            self._run()
        if not found:
            return None
        head_input = found[-1][0]
        if head_input.module not in passed:
            return head_input
        head_input, table = replace(head_input, output=passed[head_input.module]), ""
        for name, child in first.get_submodule(head_input.module).named_children():
            if isinstance(child, nn.Embedding) and child.weight.shape[1] == heads:
                table = table or name
        return replace(head_input, table=table, own=not table)

    def _find_layers(self) -> None:
        """Run the block as it is, and take the layers that compute a matrix product."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def after(path: str, module: nn.Module, args: tuple, output: object) -> None:
            self.ran.add(path)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and args:
                if isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    # A block may add to an output in place.
                    seen.setdefault(path, []).append((args[0].clone(), output.clone()))

        with hooked(self._modules, after=after):
            self._run()
        for name, runs in seen.items():
            how = _stored(self._modules[name], *runs[0])
            if len(runs) == 1 and how is not None:
                self.layers[name] = Layer(self._modules[name], how, *runs[0])

    def _reading(self, moved: str | None, of: Iterable[str] | None = None) -> list[str]:
        """Return those modules ``of`` some that read a layer's output, or the block's input."""
        found = self._inputs(moved, math.nan, of)
        return [name for name, read in found.items() if name != moved and read.isnan().any()]

    def _inputs(
        self, moved: str | None, move: Tensor | float, of: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Return what layers, or all modules without parts, read while one output is moved."""
        inputs: dict[str, Tensor] = {}

        def before(path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[path] = args[0].clone()

        parts = [n for n, m in self._modules.items() if n and next(m.children(), None) is None]
        with hooked({name: self._modules[name] for name in (parts if of is None else of)}, before):
            self._run(moved, move)
        for name in inputs.keys() & self.layers.keys():
            if inputs[name].shape != self.layers[name].input.shape:
                raise Refused(f"{name} runs on other tokens each time, as experts of a mixture do")
        return inputs

    def _read(self, consumer: str, producer: str, row: int, size: float) -> Tensor:
        """Return what a consumer reads while one output of a layer, of one token, is moved."""
        move = torch.zeros_like(self.layers[producer].output)
        move.reshape(-1, move.shape[-1])[TOKEN, row] = size
        found = self._inputs(producer, move, [consumer])
        if consumer not in found:
            raise Refused(f"{consumer} doesn't always run")
        return found[consumer]

    @torch.no_grad()
    def _run(self, moved: str | None = None, move: Tensor | float = 0.0) -> Tensor | None:
        """Run the block with all layers held, but for one or, if None is moved, its input."""
        leaves, form = tree_flatten(cloned((self.call.args, self.call.kwargs)))
        if moved is None:
            first = next(at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            leaves[first] = leaves[first] + move
        args, kwargs = tree_unflatten(leaves, form)

        def held(path: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            given = self.layers[path].output
            return given + move if path == moved else given.clone()

        with hooked({name: layer.module for name, layer in self.layers.items()}, after=held):
            return first_tensor(self.block(*args, **kwargs))


def _same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= ROUNDING * float(one.abs().max())


def _stored(module: nn.Module, input_: Tensor, output: Tensor) -> bool | None:
    """Return whether a layer's matrix is stored transposed; None if it computes something else."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    for transposed, matrix in ((False, weight.T), (True, weight)):
        if matrix.shape == (input_.shape[-1], output.shape[-1]):
            expected = input_.to(matrix) @ matrix + (0 if bias is None else bias.detach())
            same = expected.shape == output.shape
            if same and torch.allclose(expected, output.to(expected), atol=1e-5):
                return transposed
    return None
