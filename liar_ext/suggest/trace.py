"""What a pass shows: the list of blocks, and which linear layer of a block reads which.

A block runs by itself with what the model gave it. All linear layers put out what they did in
that pass, but for the one output that is moved, so that a change is seen by those alone that read
it through no other linear layer::

    move row r of P  ──▶  norm, rotation, softmax, activation, product  ──▶  columns of C change
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liar_ext.calibration.taps import Ended
from liar_ext.models.running import base_path
from liar_ext.suggest.instance import Instance, Refused, outputs

MOST_ROWS = 4000  # of all layers that a consumer reads: a second of small blocks
CHANGED = 1e-9  # of the largest value; what isn't reached stays equal, bit for bit
TOKEN = 2  # whose outputs are moved: others come before it and after it
Read = Callable[[str, Tensor], None]


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


class Layer(NamedTuple):
    """A linear layer ``W x + b`` as a pass has seen it; ``transposed``: W is (d_in, d_out)."""

    module: nn.Module
    transposed: bool
    input: Tensor
    output: Tensor

    @property
    def rows(self) -> int:
        """Features that it puts out."""
        return self.output.shape[-1]

    @property
    def columns(self) -> int:
        """Features that it reads."""
        return self.input.shape[-1]


class Reach(NamedTuple):
    """Where one output of a layer arrives: columns of a consumer, and whether at its token only."""

    columns: tuple[int, ...]
    local: bool


def find_stacks(instance: Instance) -> list[Blocks]:
    """Return all lists of blocks of a model, in the order of computation.

    Raises
    ------
    Refused
        If there is none, or something is computed between blocks.
    """
    model = instance.model
    calls = _watch(instance)
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


def _cloned(value: Any) -> Any:
    """Return arguments with copies of their tensors, which code may change in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_cloned, value))
    return {key: _cloned(each) for key, each in value.items()} if type(value) is dict else value


def _watch(instance: Instance) -> list[Call]:
    """Return every run of a module in a forward pass, in the order in which they began."""
    calls: list[Call] = []
    open_calls: list[Call] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(Call(module, _cloned(args), _cloned(kwargs)))
        open_calls.append(calls[-1])

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        open_calls.pop().output = _cloned(first_tensor(output))

    with ExitStack() as hooks:
        for module in instance.model.modules():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
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


class Trace:
    """A block, and how its linear layers depend on one another.

    Attributes
    ----------
    block, call : nn.Module, Call
        The block, and how the model ran it.
    layers : dict of str to Layer
        Those that ran once, by their path in the block, in the order in which they ran.
    others : list of str
        Parameters that are matrices, or more, of no such layer; those of most dimensions first.
    ran, repeated : set of str, list of str
        Modules that ran at all; layers that ran more than once.
    parents : dict of str to list of str
        Layers that each one reads through no other.
    readers : list of str
        Layers that read what comes into the block, through no other.
    """

    def __init__(self, call: Call) -> None:
        self.block, self.call = call.module, call
        self._generator = torch.Generator().manual_seed(2)
        self.repeated: list[str] = []
        self.ran: set[str] = set()
        self.layers = self._find_layers()
        owned = {id(p) for each in self.layers.values() for p in each.module.parameters()}
        others = {n: p.ndim for n, p in self.block.named_parameters() if id(p) not in owned}
        self.others = sorted((n for n in others if others[n] > 1), key=lambda name: -others[name])
        self.parents: dict[str, list[str]] = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            for reader in self._changed(name, self.noise(layer.output)):
                self.parents[reader].append(name)
        self.readers = self._changed(None, self.noise(call.input))

    def reaches(self, consumer: str) -> dict[str, list[Reach]]:
        """Return what each layer that a consumer reads reaches, row by row.

        Raises
        ------
        Refused
            If they have too many rows for that.
        """
        rows = sum(self.layers[parent].rows for parent in self.parents[consumer])
        if rows > MOST_ROWS:
            raise Refused(
                f"{consumer} reads layers of {rows:,} rows together, more than {MOST_ROWS:,}, and "
                "the config could not be made smaller"
            )
        return {parent: self._reach(parent, consumer) for parent in self.parents[consumer]}

    def _reach(self, producer: str, consumer: str) -> list[Reach]:
        """Return, for each output of a layer, where it arrives in the input of another."""
        layer, read = self.layers[producer], self.layers[consumer]
        scale = float(layer.output.abs().max()) + 1.0
        found = []
        for row in range(layer.rows):
            hit = torch.zeros(read.input.numel() // read.columns, read.columns, dtype=torch.bool)
            for size in (scale, -0.3 * scale):  # an activation may be flat on one side
                after = self._input(producer, self._move(producer, row, size), consumer)
                hit |= _differs(after, read.input).reshape(hit.shape)
            tokens = hit.any(1).nonzero().flatten().tolist()
            columns = tuple(hit.any(0).nonzero().flatten().tolist())
            found.append(Reach(columns, tokens in ([], [TOKEN])))
        return found

    def is_linear_in(self, producer: str, row: int, consumer: str) -> bool:
        """Tell whether a consumer's input is a linear function of one output of a layer."""
        move, before = self._move(producer, row, 1.0), self.layers[consumer].input
        once, twice = (self._input(producer, k * move, consumer) - before for k in (1.0, 2.0))
        return bool(torch.allclose(twice, 2 * once, rtol=1e-6, atol=1e-9))

    def _move(self, producer: str, row: int, size: float) -> Tensor:
        """Return what moves one output of a layer, of one token."""
        layer = self.layers[producer]
        move = torch.zeros_like(layer.output)
        move.reshape(-1, layer.rows)[TOKEN, row] = size
        return move

    def _find_layers(self) -> dict[str, Layer]:
        """Run the block as it is; return the layers that compute a matrix product."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def watch(name: str, module: nn.Module) -> Any:
            weight = getattr(module, "weight", None)
            matrix = isinstance(weight, Tensor) and weight.ndim == 2

            def note(_: nn.Module, args: tuple, output: object) -> None:
                self.ran.add(name)
                if matrix and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    # A block may add to an output in place.
                    seen.setdefault(name, []).append((args[0].clone(), output.clone()))

            return module.register_forward_hook(note)

        with ExitStack() as hooks, torch.no_grad():
            for name, module in self.block.named_modules():
                hooks.callback(watch(name, module).remove)
            self.block(*_cloned(self.call.args), **_cloned(self.call.kwargs))
        layers = {}
        for name, runs in seen.items():
            module = self.block.get_submodule(name)
            how = _stored(module, *runs[0])
            if len(runs) > 1:
                self.repeated.append(name)
            elif how is not None:
                layers[name] = Layer(module, how, *runs[0])
        return layers

    def _changed(self, moved: str | None, move: Tensor) -> list[str]:
        """Return the layers whose input changes with a layer's output, or the block's input."""
        changed: list[str] = []

        def compare(name: str, value: Tensor) -> None:
            if name != moved and bool(_differs(value, self.layers[name].input).any()):
                changed.append(name)

        self.run(moved, move, compare)
        return changed

    def _input(self, producer: str, move: Tensor, consumer: str) -> Tensor:
        """Return what a consumer reads where one layer puts out something else."""
        found: list[Tensor] = []

        def catch(name: str, value: Tensor) -> None:
            if name == consumer:
                found.append(value.detach())
                raise Ended

        self.run(producer, move, catch)
        if not found or found[0].shape != self.layers[consumer].input.shape:
            raise Refused(f"{consumer} doesn't always run, or on other tokens each time")
        return found[0]

    @torch.no_grad()
    def run(self, moved: str | None, move: Tensor | None, read: Read | None = None) -> Any:
        """Run the block with all layers held, but for one or, if None is moved, its input.

        What it puts out comes back, unless ``read``, which gets what each layer reads, ended the
        run.
        """
        args, kwargs = _cloned(self.call.args), _cloned(self.call.kwargs)
        if moved is None and move is not None:
            args, kwargs = _moved(args, kwargs, move)
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                held = layer.output + move if name == moved else layer.output
                hooks.callback(_hold(layer.module, name, held, read))
            try:
                return first_tensor(self.block(*args, **kwargs))
            except Ended:
                return None

    def noise(self, like: Tensor) -> Tensor:
        """Return random values of the size of a layer's outputs."""
        noise = torch.randn(like.shape, generator=self._generator, dtype=torch.float64)
        return (noise * (like.double().std() + 0.1)).to(like.dtype)


def _hold(module: nn.Module, name: str, held: Tensor, read: Read | None) -> Callable[[], None]:
    """Let a layer tell what it reads, and put out what it is told; return what ends that."""

    def before(_: nn.Module, args: tuple) -> None:
        if read is not None:
            read(name, args[0])

    def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return held.clone()

    hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    return lambda: [hook.remove() for hook in hooks]


def _stored(module: nn.Module, input_: Tensor, output: Tensor) -> bool | None:
    """Return whether a layer's matrix is stored transposed; None if it computes something else."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    for transposed, matrix in ((False, weight), (True, weight.T)):
        if (matrix.shape[1], matrix.shape[0]) == (input_.shape[-1], output.shape[-1]):
            expected = input_.to(matrix) @ matrix.T + (0 if bias is None else bias.detach())
            same = expected.shape == output.shape
            if same and torch.allclose(expected, output.to(expected), atol=1e-5):
                return transposed
    return None


def _differs(value: Tensor, before: Tensor) -> Tensor:
    if value.shape != before.shape:
        raise Refused("a layer runs on other tokens each time, as experts of a mixture do")
    return (value - before).abs() > CHANGED * (float(before.abs().max()) + 1.0)


def _moved(args: tuple, kwargs: dict, move: Tensor) -> tuple[tuple, dict]:
    """Return a block's arguments with its first tensor moved."""
    done = False

    def change(value: object) -> object:
        nonlocal done
        if not done and isinstance(value, Tensor) and value.shape == move.shape:
            done = True
            return value + move
        return value

    return tuple(map(change, args)), {name: change(value) for name, value in kwargs.items()}
