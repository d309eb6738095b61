"""Find a mixture of experts: its layers, which rows make which channel, and its router.

Experts lie in parameters ``(experts, ...)`` of one module, whose code no hook sees into. With zeros
for the consumer of all experts but e, and rows of the identity for that one, the module puts out
what the consumer of e reads, times the router's weight::

    y_t = r_te (I x_te)        move row r of the producer of e  ──▶  columns of x change
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liar_ext.discovery.blocks import cloned
from liar_ext.discovery.instance import Refused
from liar_ext.discovery.tracing import MOST_ROWS, Trace
from liar_ext.discovery.wiring import Found, stack_of
from liar_ext.errors import one_line
from liar_ext.models.experts import bias_name
from liar_ext.models.family import Experts, Wiring

CLOSE, CHANGED = 1e-5, 1e-12  # weights of the router are float32 in some
MOVE, STRAIGHT = 0.02, 1e-3  # such a move stays below limits, and shows an activation's curve


class _Run(NamedTuple):
    args: tuple
    kwargs: dict[str, Any]
    output: Any


def find_experts(trace: Trace) -> Found | None:
    """Return the mixture of experts of a block; None if it has none.

    Raises
    ------
    Refused
        If it has one that a row can't name.
    """
    try:
        return _found(trace)
    except Refused:
        raise
    except Exception as error:  # whatever a stranger's code raises where it gets something else
        said = f"{type(error).__name__}: {one_line(error, 120)}"
        raise Refused(f"what its experts compute can't be seen: {said}") from error


def _found(trace: Trace) -> Found | None:
    runs = _runs(trace)
    holders = [path for path in runs if len(_matrices(trace.block.get_submodule(path))) > 1]
    if not holders:
        return None
    if len(holders) > 1:
        raise Refused(f"a block has {len(holders)} mixtures of experts: {', '.join(holders[:3])}")
    (path,) = holders
    mixture = _Mixture(path, trace.block.get_submodule(path), runs[path])
    producer, consumer = mixture.layers()
    stacked = mixture.stacked(producer, consumer)
    wiring = Wiring(
        producers=(f"{path}.{producer}",),
        consumer=f"{path}.{consumer}",
        stacked={} if stacked is None else {f"{path}.{producer}": stacked},
        transposed=mixture.transposed,
        experts=_router(trace, path, runs, mixture.count),
    )
    return Found("mlp", wiring)


class _Mixture:
    """A module of experts, as it was called."""

    def __init__(self, path: str, module: nn.Module, run: _Run) -> None:
        self.path, self.module, self.run = path, module, run
        self.matrices = _matrices(module)
        given = _arguments(run)
        if given is None or run.kwargs:
            raise Refused(f"{path} isn't called with tokens, their experts and weights")
        self.hidden, self.chosen, self.weights = given
        self.count = next(iter(self.matrices.values())).shape[0]
        # The one that most tokens go to.
        self.expert = int(
            self.chosen.flatten().bincount(minlength=self.count)[: self.count].argmax()
        )
        self.transposed = False

    def layers(self) -> tuple[str, str]:
        """Return the names of the parameters that make channels, and that read them."""
        names = list(self.matrices)
        if len(names) != 2:
            raise Refused(
                f"{self.path} keeps {', '.join(names)}: one parameter that makes channels and one "
                "that reads them are known"
            )
        linear = [name for name in names if self._is_linear(name)]
        if len(linear) != 1:
            raise Refused(
                f"which of {self.path}.{' and '.join(names)} reads channels can't be seen"
            )
        (consumer,), (producer,) = linear, [name for name in names if name not in linear]
        size = self.hidden.shape[-1]
        first, last = (
            shape[1:] for shape in (self.matrices[n].shape for n in (producer, consumer))
        )
        fitting = [(first[1], last[0]) == (size, size), (first[0], last[1]) == (size, size)]
        if fitting.count(True) != 1:
            raise Refused(f"how {self.path}.{consumer} is stored can't be told from its sizes")
        self.transposed = fitting[1]
        known = {*names, *map(bias_name, names)}
        if odd := {name for name, _ in self.module.named_parameters()} - known:
            raise Refused(f"{self.path}.{min(odd)} is no weight or bias of a layer of its experts")
        if not hasattr(self.module, "_apply_gate"):
            raise Refused(
                f"{self.path} has no _apply_gate, which makes channels of what is stacked"
            )
        return producer, consumer

    def stacked(self, producer: str, consumer: str) -> Any:
        """Return the layout of what makes channels; None if a row is a channel."""
        rows = self._rows(producer, self.module).shape[0]
        channels = self._rows(consumer, self.module).shape[1]
        if rows > MOST_ROWS:
            raise Refused(f"{self.path}.{producer} has {rows:,} rows, more than {MOST_ROWS:,}")
        before = self._read(producer, consumer)
        gated = self._gated(producer)
        scale = float(before.abs().max()) + 1.0
        if float((before - gated).abs().max()) > CLOSE * scale:
            raise Refused(f"{self.path}._apply_gate isn't how its experts make channels")
        owners, linear = [], []
        for row in range(rows):
            once = self._read(producer, consumer, row, MOVE) - before
            twice = self._read(producer, consumer, row, 2 * MOVE) - before
            reached = (once.abs() > CHANGED * scale).any(0).nonzero().flatten().tolist()
            if len(reached) != 1:
                raise Refused(
                    f"row {row} of {self.path}.{producer} reaches {len(reached)} columns of "
                    f"{consumer}, not one"
                )
            owners += reached
            linear.append(_straight(once, twice))
        count, rest = divmod(rows, channels)
        if rest or sorted(owners) != sorted(list(range(channels)) * count):
            raise Refused(f"rows of {self.path}.{producer} don't reach each column equally often")
        if count == 1:
            if owners != list(range(channels)):
                raise Refused(f"rows of {self.path}.{producer} reach the columns in another order")
            return None
        parts = [linear[row] for row, owner in enumerate(owners) if owner == 0]
        names = tuple(f"part{index}" for index in range(count))
        if count == 2 and parts.count(True) == 1:
            names = tuple("up" if each else "gate" for each in parts)
        return stack_of(f"{self.path}.{producer}", names, owners, None, channels, channels, 1)

    def _rows(self, name: str, module: nn.Module) -> Tensor:
        """Return the weight of the chosen expert as (d_out, d_in), a view."""
        weight = getattr(module, name)[self.expert]
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def _output(self, module: nn.Module) -> Tensor:
        return module(*cloned(self.run.args))

    @torch.no_grad()
    def _is_linear(self, name: str) -> bool:
        """Tell whether what the module puts out is an affine function of a parameter."""
        generator = torch.Generator().manual_seed(5)
        weight = getattr(self.module, name)
        move = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        found = []
        for factor in (0.0, 1.0, 2.0):
            module = copy.deepcopy(self.module)
            getattr(module, name).add_(move, alpha=factor)
            found.append(self._output(module))
        none, once, twice = found
        return _straight(once - none, twice - none)

    @torch.no_grad()
    def _read(self, producer: str, consumer: str, row: int = 0, move: float = 0.0) -> Tensor:
        """Return what the consumer of the expert reads, ``(routed, channels)``, a row moved."""
        module = copy.deepcopy(self.module)
        self._rows(producer, module)[row].add_(move)
        weight, bias = getattr(module, consumer), getattr(module, bias_name(consumer), None)
        if bias is not None:
            bias.zero_()
        token, place = torch.where(self.chosen == self.expert)
        rows, channels = self._rows(consumer, module).shape
        found = []
        for start in range(0, channels, rows):
            width = min(rows, channels - start)
            weight.zero_()
            self._rows(consumer, module)[:width, start : start + width] = torch.eye(width)
            found.append(self._output(module)[token][:, :width])
        return torch.cat(found, dim=1) / self.weights[token, place, None]

    @torch.no_grad()
    def _gated(self, producer: str) -> Tensor:
        """Return what the consumer reads as ``_apply_gate`` makes it of the producer's output."""
        token, _ = torch.where(self.chosen == self.expert)
        out = self.hidden[token] @ self._rows(producer, self.module).T
        bias = getattr(self.module, bias_name(producer), None)
        return self.module._apply_gate(out if bias is None else out + bias[self.expert])


def _straight(once: Tensor, twice: Tensor) -> bool:
    """Tell whether a move of twice the size changed twice as much."""
    return float((twice - 2 * once).abs().max()) <= STRAIGHT * float(once.abs().max())


def _runs(trace: Trace) -> dict[str, _Run]:
    """Return how the modules of a block were called, and what they gave, by path."""
    runs: dict[str, _Run] = {}

    def note(path: str) -> Any:
        def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            runs[path] = _Run(cloned(args), kwargs, cloned(output))

        return after

    modules = [(path, module) for path, module in trace.block.named_modules() if path]
    hooks = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in modules]
    try:
        with torch.no_grad():
            trace.block(*cloned(trace.call.args), **cloned(trace.call.kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return runs


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that hold a matrix for each of several experts."""
    found = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    same = {parameter.shape[0] for parameter in found.values()}
    return found if len(same) == 1 else {}


def _arguments(run: _Run) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return tokens, the experts of each and their weights, if these are the arguments."""
    if len(run.args) < 3 or not all(isinstance(each, Tensor) for each in run.args[:3]):
        return None
    hidden, chosen, weights = run.args[:3]
    fits = hidden.ndim == 2 and chosen.shape == weights.shape == (len(hidden), chosen.shape[-1])
    return (hidden, chosen, weights) if fits and not chosen.is_floating_point() else None


def _router(trace: Trace, path: str, runs: dict[str, _Run], count: int) -> Experts:
    """Return where experts are, and what gives the weights and experts that they get."""
    hidden, chosen, weights = _arguments(runs[path])
    for name, run in runs.items():
        given = run.output
        if not isinstance(given, tuple) or len(given) != 3:
            continue
        if not all(isinstance(each, Tensor) for each in given) or given[2].shape != chosen.shape:
            continue
        if not (torch.equal(given[2], chosen) and torch.equal(given[1], weights)):
            continue
        router = trace.block.get_submodule(name)
        own = {each: tuple(p.shape) for each, p in router.named_parameters()}
        matrices = [each for each, shape in own.items() if shape == (count, hidden.shape[-1])]
        if len(matrices) != 1 or any(count not in shape for shape in own.values()):
            raise Refused(f"{name}, which chooses experts, keeps more than numbers for each expert")
        if len(run.args) != 1 or run.kwargs or getattr(router, "top_k", None) != chosen.shape[-1]:
            raise Refused(f"{name}, which chooses experts, doesn't take tokens alone, top_k each")
        return Experts(path, name, *(() if matrices == ["weight"] else matrices))
    raise Refused(
        f"what chooses the experts of {path} is no module that gives logits, weights and experts"
    )
