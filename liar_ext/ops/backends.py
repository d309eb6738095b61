"""Which backend serves an operator on a GPU: checked against float64, timed, and kept.

========================================  ==================================================
``gram_update_``                          ``csrc``, one Triton kernel, or ``torch``, triangle
                                          panels through cuBLAS: chosen
``reconstruct``, up to 128 kept features  ``csrc``, one launch for all λ, or ``torch``: chosen
``reconstruct``, more                     ``torch``: cuSOLVER and cuBLAS, by torch.linalg
``obs_curve``, units of one feature       ``csrc``, one launch a step, or ``torch``: chosen
``obs_curve``, wider units                ``torch``
========================================  ==================================================

``csrc`` are the CUDA kernels of this package. At the first call of a kind on a device, the backends
that exist are checked on a small problem. Of those that are right, the fastest is taken, and noted
in a cache file for the next process. A backend that is wrong or raises is left out, with a warning.
``LIAR_GRAM`` and ``LIAR_SOLVE`` force a backend, unchecked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from liar_ext.ops import dispatch, reference
from liar_ext.system.environment import version_of
from liar_ext.system.errors import InputError, one_line

RUNS = 3  # that are timed
GRAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2.0**-20}  # of the sum of magnitudes
TOLERANCE = 1e-8  # of the largest value of a solve, as in the tests of the kernels
SMALL = 128  # kept features of a system that one CUDA block solves
MOST = 4096  # features, tokens and columns of a problem that is timed
STEPS = 16  # removals of the elimination that is timed
Backend = Callable[..., object]


@dataclass(frozen=True)
class Kind:
    """What a choice holds for; its text is the key of a measurement."""

    device: torch.device
    words: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()  # rounded up, so that one measurement serves many

    def __str__(self) -> str:
        return " ".join([str(self.device), *self.words, " × ".join(map(str, self.sizes))]).rstrip()


@dataclass
class Chooser:
    """The choices of a process between the backends of an operator."""

    name: str
    variable: str  # of the environment, forces a backend
    backends: Callable[[torch.device], Mapping[str, Backend]]  # of equal speed the first is taken
    fault: Callable[[Backend, Kind], str]  # of a backend on a small problem, or nothing
    problem: Callable[[Kind], Callable[[Backend], object]]  # gives a problem of a kind to a backend
    chosen: dict[Kind, str] = field(init=False, default_factory=dict)
    seconds: dict[Kind, dict[str, float]] = field(init=False, default_factory=dict)
    # By kind and backend why it is wrong, or nothing where it is right.
    wrong: dict[tuple[Kind, str], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.backends = functools.cache(self.backends)  # are looked for once a device

    def choose(self, kind: Kind) -> str:
        """Return the name of the backend for a kind of call, found once."""
        if kind in self.chosen:
            return self.chosen[kind]
        found, forced = self.backends(kind.device), os.environ.get(self.variable)
        if forced and forced not in found:
            raise InputError(
                f"{self.variable}={forced}: must be one of {', '.join(found)} on {kind.device}; "
                "unset it to let the fastest be found"
            )
        chosen = forced
        if not forced:
            if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return next(iter(found))  # no clock runs in a graph
            right = {name: each for name, each in found.items() if self._is_right(kind, name)}
            if not right:
                raise RuntimeError(
                    f"{self.name}: no backend is right on {kind.device}; use --device cpu"
                )
            chosen = self._fastest(kind, right)
        self.chosen[kind] = chosen
        return chosen

    def backend(self, kind: Kind) -> Backend:
        """Return the backend for a kind of call."""
        return self.backends(kind.device)[self.choose(kind)]

    def _is_right(self, kind: Kind, name: str) -> bool:
        """Tell whether a backend passes the check, one for all sizes; warn where it does not."""
        key = replace(kind, sizes=()), name
        if key not in self.wrong:
            try:
                why = self.fault(self.backends(kind.device)[name], kind)
            except Exception as error:  # of a compiler, a driver or a library: it is out
                why = f"it raises {type(error).__name__}: {one_line(error)}"
            self.wrong[key] = why
            if why:
                warnings.warn(
                    f"liar_ext: the {name} backend of {self.name} is left out on {key[0]}: {why}. "
                    "The others do the work. Please report this with the output of "
                    "`liar doctor --json`, see CONTRIBUTING.md",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return not self.wrong[key]

    def _fastest(self, kind: Kind, right: Mapping[str, Backend]) -> str:
        """Return the fastest backend, from the cache file or by the clock."""
        if len(right) == 1:
            return next(iter(right))
        key = f"{self.name} on {machine(kind.device)}: {kind}"
        kept = _read().get(key, {})
        if kept.keys() != right.keys():
            try:
                run = self.problem(kind)
                kept = {name: seconds(lambda each=each: run(each)) for name, each in right.items()}
            except torch.OutOfMemoryError:
                return next(iter(right))
            _write(key, kept)
        self.seconds[kind] = kept
        return min(right, key=lambda name: kept[name])

    def lines(self) -> list[str]:
        """Return each choice, with milliseconds, and what was left out."""
        said = []
        for kind, name in self.chosen.items():
            times = self.seconds.get(kind, {}).items()
            beside = ", ".join(f"{each} {1e3 * value:.3g} ms" for each, value in times)
            said.append(f"{kind}: {name} ({beside})" if beside else f"{kind}: {name}")
        left_out = ((key, why) for key, why in self.wrong.items() if why)
        return said + [f"{kind}: not {name}: {why}" for (kind, name), why in left_out]


def power_of_two(size: int, most: int) -> int:
    """Return a size rounded up to a power of two, from 32 on and up to a limit."""
    return min(most, 1 << max(5, (size - 1).bit_length()))


def seconds(run: Callable[[], object]) -> float:
    """Return the least time of a call on a GPU, after one that may compile."""
    times = []
    for _ in range(RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.no_grad():
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])


def machine(device: torch.device) -> str:
    """Return what a measurement holds for: the card, and the libraries that were measured."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = importlib.util.find_spec("triton") and version_of("triton")
    return f"{card}, torch {torch.__version__}, triton {triton}, liar_ext {version_of('liar_ext')}"


def cache_file() -> Path:
    """Return the file that keeps measurements from one process to the next."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "liar_ext", "backends.json")


def _read() -> dict[str, dict[str, float]]:
    """Return what was measured; nothing of a file that is not as it was written."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError, TypeError):
        found = json.loads(cache_file().read_text("utf-8"))
        return {key: times for key, times in found.items() if min(times.values()) > 0}
    return {}


def _write(key: str, times: Mapping[str, float]) -> None:
    """Note a measurement; where that can't be done the next process measures again."""
    with contextlib.suppress(OSError, RuntimeError):  # the latter without a home
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        cache_file().write_text(json.dumps({**_read(), key: times}, indent=1), "utf-8")


def gram_update_(gram, total, count, x, y, weight) -> None:
    """Update by the backend that was chosen for calls of this kind."""
    arguments = gram, total, count, x, y, weight
    weighted = weight is not None and weight.dtype != torch.bool
    sizes = (power_of_two(n, MOST) for n in x.shape)
    name = grams.choose(gram_kind(x.device, x.dtype, gram.dtype, weighted, y is not None, *sizes))
    if name != "csrc":
        dispatch.check_gram_update(*arguments)  # as its launcher does
    with torch.no_grad():
        grams.backends(x.device)[name](*arguments)


def gram_kind(
    device: torch.device,
    dtype: torch.dtype,
    sums: torch.dtype,
    weighted: bool,
    cross: bool,
    *sizes: int,
) -> Kind:
    """Return the kind of a Gram update; sizes are those of x."""
    words = [str(one).removeprefix("torch.") for one in (dtype, sums)]
    return Kind(device, (*words, *["weighted"] * weighted, *["cross"] * cross), sizes)


def gram_backends(device: torch.device) -> dict[str, Backend]:
    """Return the backends of Gram updates that exist on a device."""
    found: dict[str, Backend] = {}
    modern = device.type == "cuda" and dispatch.runs_kernels(device)
    if modern and dispatch.serves(device):
        found["csrc"] = torch.ops.liar_ext.gram_update_
    if modern and importlib.util.find_spec("triton"):
        with contextlib.suppress(ImportError):
            from liar_ext.ops import gram_triton

            found["triton"] = gram_triton.gram_update_
    return {**found, "torch": reference.gram_update_}


def gram_fault(update: Backend, kind: Kind) -> str:
    """Return what is wrong with a Gram update on a small problem, or nothing."""
    generator = torch.Generator().manual_seed(0)
    dtype, sums = (getattr(torch, word) for word in kind.words[:2])
    cross = "cross" in kind.words
    tokens, d, columns = 700, 161, 133 if cross else 161
    x = (torch.randn(tokens, d, generator=generator) + 0.5).to(dtype)
    y = torch.randn(tokens, columns, generator=generator).to(dtype) if cross else None
    weight = torch.rand(tokens, generator=generator)
    weight = weight if "weighted" in kind.words else weight > 0.1
    weight[0], weight[1:4] = 0, 1
    x[0], x[2, 40], x[699, 160] = torch.nan, torch.inf, torch.nan  # skipped, dropped, dropped
    weight[699] = 1
    got, want, bound = (_sums(x, y, each) for each in (sums, torch.float64, torch.float64))
    wide, right = x.double(), None if y is None else y.double()
    reference.gram_update_(*want, wide, right, weight)
    reference.gram_update_(*bound, wide.abs(), None if right is None else right.abs(), weight)
    got = [(one + 1).to(kind.device) for one in got]
    move = (None if one is None else one.to(kind.device) for one in (x, y, weight))
    with torch.no_grad():
        update(*got, *move)
    rounding, allowed = torch.finfo(sums).eps, GRAM_TOLERANCE.get(dtype, 2.0**-17)
    rooms = (
        allowed * scale + 4 * rounding * (1 + each.abs())
        for scale, each in zip(bound, want, strict=True)
    )
    return _difference("gram total count", (one.double() - 1 for one in got), want, rooms)


def _sums(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Return empty sums over rows, on their device."""
    columns, wide = x.shape[1] if y is None else y.shape[1], torch.float64
    shapes = ((x.shape[1], columns), dtype), ((x.shape[1],), dtype), ((2,), wide)
    return [torch.zeros(shape, dtype=kind, device=x.device) for shape, kind in shapes]


def gram_problem(kind: Kind) -> Callable[[Backend], object]:
    """Return what updates sums of this kind by a backend."""
    dtype, sums = (getattr(torch, word) for word in kind.words[:2])
    x = torch.ones(*kind.sizes, dtype=dtype, device=kind.device)
    weight = torch.rand(len(x), device=kind.device) if "weighted" in kind.words else None
    y = x if "cross" in kind.words else None
    arguments = *_sums(x, y, sums), x, y, weight
    return lambda update: update(*arguments)


def reconstruct_on_cuda(weight, gram, kept, *more):
    """Solve by cuSOLVER, and small systems by the faster of it and a kernel, without waiting."""
    dispatch.check_reconstruct(weight, gram, kept, *more, values=False)
    small = kept.shape[-1] <= SMALL and dispatch.serves(weight.device)
    with torch.no_grad():
        solve = _solve if small else None
        return reference.reconstruct(weight, gram, kept, *more, solve=solve)


def _solve(block: Tensor, side: Tensor, shifts: Tensor):
    sizes = power_of_two(len(block), SMALL), power_of_two(side.shape[1], MOST), len(shifts)
    return solves.backend(Kind(block.device, sizes=sizes))(block, side, shifts)


def _solve_by_kernel(block, side, shifts):
    contiguous = block.contiguous(), side.contiguous(), shifts
    x, code, diagonal = torch.ops.liar_ext._solve_small(*contiguous)
    return zip(x, code, reference.condition_of(diagonal), strict=True)


def obs_curve_on_cuda(weight, gram, width, *more):
    """Eliminate single features by the faster of a kernel and libraries, wider units by these."""
    dispatch.check_obs_curve(weight, gram, width, *more)
    eliminate = None
    if width == 1 and dispatch.serves(weight.device):
        eliminate = curves.backend(Kind(weight.device, sizes=(power_of_two(len(gram), MOST),)))
    with torch.no_grad():
        return reference.obs_curve(weight, gram, width, *more, eliminate=eliminate)


def _eliminate_by_kernel(s: reference.Elimination, first: int, count: int):
    rows = s.h.new_empty(2, count, len(s.unit))
    gone = torch.zeros_like(s.unit, dtype=torch.bool)
    diagonals = (each.diagonal().clone() for each in (s.h, s.v))
    state = s.h, s.v, s.unit, s.lost, s.order, s.error
    torch.ops.liar_ext._eliminate_(*state, *rows, gone, *diagonals, first, s.per_group)
    return *rows, gone


def existing(kernel: Backend, library: Backend, device: torch.device) -> Mapping[str, Backend]:
    """Return which of both backends exist on a device."""
    return ({"csrc": kernel} if dispatch.serves(device) else {}) | {"torch": library}


def solve_fault(solve: Backend, kind: Kind) -> str:
    """Return what is wrong with solves of a sound and of an indefinite system, or nothing."""
    weight, gram = _layer(200)
    damps = torch.tensor([0, 1e-3, 10, torch.inf], dtype=torch.float64)
    indefinite = gram.clone()
    indefinite[7, 7] = -1
    for sums, n in ((gram, 97), (indefinite, SMALL)):
        arguments = weight, sums, torch.arange(n), damps, gram
        there = (each.to(kind.device) for each in arguments)
        got, want = reference.reconstruct(*there, solve=solve), reference.reconstruct(*arguments)
        if why := _difference("W' error held-out info", got, want, map(_room, want)):
            return f"{n} kept features: {why}"
    return ""


def curve_fault(eliminate: Backend, kind: Kind) -> str:
    """Return what is wrong with a curve of single features in groups, or nothing."""
    layer, more = _layer(161), (1, 1e-2, 7, 7)
    got = reference.obs_curve(*(each.to(kind.device) for each in layer), *more, eliminate)
    want = reference.obs_curve(*layer, *more)
    return _difference("order error info", got, want, map(_room, want))


def _layer(d: int) -> tuple[Tensor, Tensor]:
    """Return a weight of 40 outputs and a Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(40 + 2 * d, d, generator=generator, dtype=torch.float64)
    return both[:40], both[40:].mT @ both[40:] / (2 * d)


def _room(want: Tensor) -> Tensor:
    return TOLERANCE * want.double().nan_to_num(0, 0, 0).abs().max()


def _difference(
    names: str, got: Iterable[Tensor], want: Iterable[Tensor], rooms: Iterable[Tensor]
) -> str:
    """Return the first element of a result that is beyond its room, or nothing."""
    for name, found, right, room in zip(names.split(), got, want, rooms, strict=True):
        a, b = found.double().cpu(), right.double()
        wrong = ~((a == b) | ((a - b).abs() <= room) | (a.isnan() & b.isnan()))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{name}{list(at)} is {a[at]:.9g} where {b[at]:.9g} is right"
    return ""


def solve_problem(kind: Kind) -> Callable[[Backend], object]:
    """Return what solves systems of this kind by a backend."""
    n, columns, ladder = kind.sizes
    like = {"dtype": torch.float64, "device": kind.device}
    block = torch.eye(n, **like) + 1 / n
    system = block, torch.ones(n, columns, **like), torch.ones(ladder, **like)
    return lambda solve: list(solve(*system))  # one by one, of a library


def curve_problem(kind: Kind) -> Callable[[Backend], object]:
    """Return what removes some features of this many by a backend."""
    (n,) = kind.sizes
    like = {"dtype": torch.float64, "device": kind.device}
    eye, unit = torch.eye(n, **like), torch.arange(n, device=kind.device)

    def run(eliminate: Backend) -> object:
        made = torch.full_like(unit[:1], -1), unit.clone(), torch.zeros(n + 1, **like)
        return eliminate(reference.Elimination(eye, eye, unit, *made, 1, n), 0, STEPS)

    return run


grams = Chooser("gram_update_", "LIAR_GRAM", gram_backends, gram_fault, gram_problem)
_solvers = functools.partial(existing, _solve_by_kernel, reference.solve_by_library)
solves = Chooser("reconstruct", "LIAR_SOLVE", _solvers, solve_fault, solve_problem)
_eliminators = functools.partial(existing, _eliminate_by_kernel, reference.eliminate_panel)
curves = Chooser("obs_curve", "LIAR_SOLVE", _eliminators, curve_fault, curve_problem)
dispatch.library.impl("reconstruct", reconstruct_on_cuda, "CUDA")
dispatch.library.impl("obs_curve", obs_curve_on_cuda, "CUDA")
