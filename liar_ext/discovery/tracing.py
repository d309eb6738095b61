"""Which linear layer of a block reads which, and what of it, by moving single outputs.

The block runs by itself with what the model gave it. All linear layers put out what they did in
that pass, but for the one output that is moved, so that a change is seen by those alone that read
it through no other linear layer::

    move row r of P  ──▶  norm, rotation, softmax, activation, product  ──▶  columns of C change
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.calibration.hooks import Ended
from liar_ext.discovery.blocks import Call, cloned, first_tensor
from liar_ext.discovery.instance import Refused

MOST_ROWS = 4000  # of all layers that a consumer reads: a second of small blocks
CHANGED = 1e-9  # of the largest value; what isn't reached stays equal, bit for bit
TOKEN = 2  # whose outputs are moved: others come before it and after it


@dataclass
class Layer:
    """A linear layer as a pass has seen it.

    Parameters
    ----------
    module : nn.Module
        It computes ``W x + b``.
    transposed : bool
        Whether W is stored as (d_in, d_out).
    input, output : Tensor
        Of the pass.
    """

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


@dataclass(frozen=True)
class Reach:
    """Where one output of a layer arrives: columns of a consumer, and whether at its token only."""

    columns: tuple[int, ...]
    local: bool


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
        owned = {
            id(parameter) for each in self.layers.values() for parameter in each.module.parameters()
        }
        others = {
            name: parameter.ndim
            for name, parameter in self.block.named_parameters()
            if parameter.ndim >= 2 and id(parameter) not in owned
        }
        self.others = sorted(others, key=lambda name: -others[name])
        self.parents: dict[str, list[str]] = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            for reader in self._changed(name, self.noise(layer.output)):
                self.parents[reader].append(name)
        hidden = first_tensor((call.args, call.kwargs))
        self.readers = self._changed(None, self.noise(hidden))

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
        return {parent: self.reach(parent, consumer) for parent in self.parents[consumer]}

    def reach(self, producer: str, consumer: str) -> list[Reach]:
        """Return, for each output of a layer, where it arrives in the input of another."""
        layer = self.layers[producer]
        scale = float(layer.output.abs().max()) + 1.0
        found = []
        for row in range(layer.rows):
            hit = torch.zeros(
                self.layers[consumer].input.reshape(-1, self.layers[consumer].columns).shape,
                dtype=torch.bool,
            )
            for size in (scale, -0.3 * scale):  # an activation may be flat on one side
                move = torch.zeros_like(layer.output)
                move.reshape(-1, layer.rows)[TOKEN, row] = size
                hit |= self._difference(producer, move, consumer)
            tokens = hit.any(1).nonzero().flatten().tolist()
            columns = tuple(hit.any(0).nonzero().flatten().tolist())
            found.append(Reach(columns, tokens in ([], [TOKEN])))
        return found

    def writers(self) -> list[str]:
        """Return the layers that what the block puts out depends on, through no other."""
        before = self.run(None, torch.zeros(()), _unread)
        moved = {
            name: self.run(name, self.noise(layer.output), _unread)
            for name, layer in self.layers.items()
        }
        return [name for name, after in moved.items() if _differs(after, before).any()]

    def reads_features(self, consumer: str) -> bool:
        """Tell whether a layer reads what comes into the block, each feature by itself."""
        hidden, before = (
            first_tensor((self.call.args, self.call.kwargs)),
            self.layers[consumer].input,
        )
        if hidden.shape[-1] != before.shape[-1]:
            return False
        for feature in (0, hidden.shape[-1] - 1):
            move = torch.zeros_like(hidden)
            move[..., feature] = float(hidden.abs().max()) + 1.0
            hit = _differs(self._input(None, move, consumer), before).reshape(-1, before.shape[-1])
            if hit.any(0).nonzero().flatten().tolist() != [feature]:
                return False
        return True

    def is_linear_in(self, producer: str, row: int, consumer: str) -> bool:
        """Tell whether a consumer's input is a linear function of one output of a layer."""
        layer = self.layers[producer]
        move = torch.zeros_like(layer.output)
        move.reshape(-1, layer.rows)[TOKEN, row] = 1.0
        before = self.layers[consumer].input
        once, twice = (self._input(producer, k * move, consumer) - before for k in (1.0, 2.0))
        return bool(torch.allclose(twice, 2 * once, rtol=1e-6, atol=1e-9))

    def _find_layers(self) -> dict[str, Layer]:
        """Run the block as it is; return the layers that compute a matrix product."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        handles = []
        for name, module in self.block.named_modules():
            weight = getattr(module, "weight", None)
            matrix = isinstance(weight, Tensor) and weight.ndim == 2

            def note(
                _: nn.Module, args: tuple, output: object, name: str = name, matrix: bool = matrix
            ) -> None:
                self.ran.add(name)
                if matrix and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    # A block may add to an output in place.
                    seen.setdefault(name, []).append((args[0].clone(), output.clone()))

            handles.append(module.register_forward_hook(note))
        try:
            with torch.no_grad():
                self.block(*cloned(self.call.args), **cloned(self.call.kwargs))
        finally:
            for handle in handles:
                handle.remove()
        layers = {}
        for name, runs in seen.items():
            module = self.block.get_submodule(name)
            how = stored(module, *runs[0])
            if len(runs) > 1:
                self.repeated.append(name)
            elif how is not None:
                layers[name] = Layer(module, how, *runs[0])
        return layers

    def _changed(self, moved: str | None, move: Tensor) -> list[str]:
        """Return the layers whose input changes with a layer's output, or the block's input."""
        changed = []

        def compare(name: str, value: Tensor) -> None:
            if name != moved and _differs(value, self.layers[name].input).any():
                changed.append(name)

        self.run(moved, move, compare)
        return changed

    def _difference(self, producer: str, move: Tensor, consumer: str) -> Tensor:
        value, before = self._input(producer, move, consumer), self.layers[consumer].input
        return _differs(value, before).reshape(-1, before.shape[-1])

    def _input(self, producer: str | None, move: Tensor, consumer: str) -> Tensor:
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
    def run(self, moved: str | None, move: Tensor, read) -> Tensor | None:
        """Run the block with all layers held, but for one or for the block's input.

        What it puts out comes back, unless ``read`` ended the run.
        """
        args, kwargs = self.call.args, self.call.kwargs
        args, kwargs = cloned(args), cloned(kwargs)
        if moved is None and move.ndim:
            args, kwargs = _moved(args, kwargs, move)
        with self._held(moved, move, read):
            try:
                return first_tensor(self.block(*args, **kwargs))
            except Ended:
                return None

    @contextmanager
    def _held(self, moved: str | None, move: Tensor, read) -> Iterator[None]:
        handles = []
        for name, layer in self.layers.items():
            held = layer.output + move if name == moved else layer.output

            def before(_: nn.Module, args: tuple, name: str = name) -> None:
                read(name, args[0])

            def after(_: nn.Module, args: tuple, output: Tensor, held: Tensor = held) -> Tensor:
                return held.clone()

            handles += [
                layer.module.register_forward_pre_hook(before),
                layer.module.register_forward_hook(after),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def noise(self, like: Tensor) -> Tensor:
        """Return random values of the size of a layer's outputs."""
        noise = torch.randn(like.shape, generator=self._generator, dtype=torch.float64)
        return (noise * (like.double().std() + 0.1)).to(like.dtype)


def _unread(name: str, value: Tensor) -> None:
    """Take no notice of what a layer reads."""


def stored(module: nn.Module, input_: Tensor, output: Tensor) -> bool | None:
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
