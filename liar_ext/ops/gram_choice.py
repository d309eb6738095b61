"""Which backend updates a Gram matrix on a GPU: checked against float64, timed, and kept.

Three do the same: ``csrc`` is the CUDA kernel of this package, ``triton`` one Triton kernel,
``torch`` triangle panels through cuBLAS. At the first update of a kind of shape on a device those
that exist are checked on a small problem; of those that are right, the fastest on a problem of that
kind is taken, and noted in a cache file for the next process. One that is wrong or raises is left
out, with a warning. ``LIAR_GRAM`` forces a backend, unchecked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from liar_ext.environment import version_of
from liar_ext.errors import InputError, one_line
from liar_ext.ops import checks, dispatch, reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2.0**-20}  # of the sum of magnitudes
HALF_TOLERANCE = 2.0**-17
MOST = 4096  # features, and tokens, of the problem that is timed
RUNS = 3
Update = Callable[..., None]


@dataclass(frozen=True)
class Kind:
    """What a choice holds for; sizes are rounded up to powers of two."""

    device: torch.device
    dtype: torch.dtype
    sums: torch.dtype
    weighted: bool
    cross: bool
    tokens: int = 0
    features: int = 0

    @classmethod
    def of(cls, gram: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None) -> Kind:
        """Return the kind of a call."""
        weighted = weight is not None and weight.dtype != torch.bool
        sizes = (min(MOST, 1 << max(5, (n - 1).bit_length())) for n in x.shape)
        return cls(x.device, x.dtype, gram.dtype, weighted, y is not None, *sizes)

    def __str__(self) -> str:
        words = [str(one).removeprefix("torch.") for one in (self.device, self.dtype, self.sums)]
        words += ["weighted"] * self.weighted + ["cross"] * self.cross
        return " ".join([*words, f"{self.tokens} × {self.features}"])


class Chooser:
    """The choices of a process.

    ``backends`` returns for a device those that exist there, by their names; of equal speed the
    first is taken.
    """

    def __init__(
        self, backends: Callable[[torch.device], Mapping[str, Update]] | None = None
    ) -> None:
        self.backends = functools.cache(backends or existing)  # are looked for once a device
        self.chosen: dict[Kind, str] = {}
        self.seconds: dict[Kind, dict[str, float]] = {}
        self.wrong: dict[tuple[Kind, str], str] = {}  # why, or nothing where it is right

    def choose(self, kind: Kind) -> str:
        """Return the name of the backend for a kind of call, found once."""
        if kind in self.chosen:
            return self.chosen[kind]
        found = self.backends(kind.device)
        forced = os.environ.get("LIAR_GRAM")
        if forced:
            if forced not in found:
                raise InputError(
                    f"LIAR_GRAM={forced}: must be one of {', '.join(found)} on {kind.device}; "
                    "unset it to let the fastest be found"
                )
            self.chosen[kind] = forced
            return forced
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return next(iter(found))  # no clock runs in a graph
        right = {name: update for name, update in found.items() if self._is_right(kind, name)}
        if not right:
            raise RuntimeError(
                f"gram_update_: no backend is right on {kind.device}; use --device cpu"
            )
        self.chosen[kind] = self._fastest(kind, right)
        return self.chosen[kind]

    def _is_right(self, kind: Kind, name: str) -> bool:
        """Tell whether a backend passes the check, and say so loudly where it does not."""
        key = replace(kind, tokens=0, features=0), name  # one check serves all sizes
        if key not in self.wrong:
            self.wrong[key] = fault(self.backends(kind.device)[name], kind)
            if self.wrong[key]:
                warnings.warn(
                    f"liar_ext: the {name} backend of gram_update_ is left out on {kind.device} "
                    f"for {kind.dtype}: {self.wrong[key]}. The others do the work. Please report "
                    "this with the output of `liar doctor --json`, see CONTRIBUTING.md",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return not self.wrong[key]

    def _fastest(self, kind: Kind, right: Mapping[str, Update]) -> str:
        """Return the fastest backend, from the cache file or by the clock."""
        if len(right) == 1:
            return next(iter(right))
        key = f"{machine(kind.device)}: {kind}"
        kept = _read().get(key)
        if not isinstance(kept, dict) or set(kept) != set(right):
            try:
                kept = {name: seconds(update, kind) for name, update in right.items()}
            except torch.OutOfMemoryError:
                return next(iter(right))
            _write(key, kept)
        self.seconds[kind] = kept
        return min(right, key=lambda name: kept[name])

    def lines(self) -> list[str]:
        """Return each choice, with milliseconds, and what was left out."""
        said = []
        for kind, name in self.chosen.items():
            times = self.seconds.get(kind, {})
            beside = ", ".join(f"{each} {1e3 * value:.3g} ms" for each, value in times.items())
            said.append(f"{kind}: {name}" + (f" ({beside})" if beside else ""))
        return said + [
            f"{kind}: not {name}: {why}" for (kind, name), why in self.wrong.items() if why
        ]


def gram_update_(
    gram: Tensor,
    total: Tensor,
    count: Tensor,
    x: Tensor,
    y: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Update by the backend that was chosen for calls of this kind."""
    arguments = gram, total, count, x, y, weight
    name = chooser.choose(Kind.of(gram, x, y, weight))
    if name != "csrc":
        checks.check_gram_update(*arguments)  # as its launcher does
    with torch.no_grad():
        chooser.backends(x.device)[name](*arguments)


def existing(device: torch.device) -> dict[str, Update]:
    """Return the backends that exist on a device."""
    found: dict[str, Update] = {}
    modern = device.type == "cuda" and dispatch.runs_kernels(device)
    if modern and dispatch.serves(device):
        found["csrc"] = torch.ops.liar_ext.gram_update_
    if modern and importlib.util.find_spec("triton"):
        with contextlib.suppress(ImportError):
            from liar_ext.ops import gram_triton

            found["triton"] = gram_triton.gram_update_
    return {**found, "torch": reference.gram_update_}


def fault(update: Update, kind: Kind) -> str:
    """Return what is wrong with a backend on a small problem, or nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens, d, columns = 700, 161, 133 if kind.cross else 161
    x = (torch.randn(tokens, d, generator=generator) + 0.5).to(kind.dtype)
    y = None
    if kind.cross:
        y = torch.randn(tokens, columns, generator=generator).to(kind.dtype)
    weight = torch.rand(tokens, generator=generator)
    weight = weight if kind.weighted else weight > 0.1
    weight[0], weight[1:4] = 0, 1
    x[0], x[2, 40], x[699, 160] = torch.nan, torch.inf, torch.nan  # skipped, dropped, dropped
    weight[699] = 1
    got, want, bound = (_sums(x, y, dtype) for dtype in (kind.sums, None, None))
    wide, right = x.double(), None if y is None else y.double()
    reference.gram_update_(*want, wide, right, weight)
    reference.gram_update_(*bound, wide.abs(), None if right is None else right.abs(), weight)
    got = [(one + 1).to(kind.device) for one in got]
    move = (None if one is None else one.to(kind.device) for one in (x, y, weight))
    try:
        with torch.no_grad():
            update(*got, *move)
        found = [one.double().cpu() - 1 for one in got]
    except Exception as error:  # of a compiler, a driver or a library: whatever it is, it is out
        return f"it raises {type(error).__name__}: {one_line(error)}"
    rounding = torch.finfo(kind.sums).eps
    allowed = TOLERANCE.get(kind.dtype, HALF_TOLERANCE)
    for name, a, b, scale in zip(("gram", "total", "count"), found, want, bound, strict=True):
        wrong = ~((a - b).abs() <= allowed * scale + 4 * rounding * (1 + b.abs()))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{name}{list(at)} is {a[at]:.9g} where {b[at]:.9g} is right"
    return ""


def _sums(x: Tensor, y: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return empty sums over rows, on their device."""
    columns, wide = x.shape[1] if y is None else y.shape[1], torch.float64
    shapes = ((x.shape[1], columns), dtype), ((x.shape[1],), dtype), ((2,), wide)
    return [torch.zeros(shape, dtype=kind or wide, device=x.device) for shape, kind in shapes]


def seconds(update: Update, kind: Kind) -> float:
    """Return the least time of an update of this kind, after one that may compile."""
    tokens, d = kind.tokens, kind.features
    x = torch.ones(tokens, d, dtype=kind.dtype, device=kind.device)
    weight = torch.rand(tokens, device=kind.device) if kind.weighted else None
    y = x if kind.cross else None
    arguments = *_sums(x, y, kind.sums), x, y, weight
    least = float("inf")
    for run in range(RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.no_grad():
            update(*arguments)
        end.record()
        end.synchronize()
        if run > 0:
            least = min(least, begin.elapsed_time(end) / 1e3)
    return least


def machine(device: torch.device) -> str:
    """Return what a measurement holds for: the card, and the libraries that were measured."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = importlib.util.find_spec("triton") and version_of("triton")
    return f"{card}, torch {torch.__version__}, triton {triton}, liar_ext {version_of('liar_ext')}"


def cache_file() -> Path:
    """Return the file that keeps measurements from one process to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "liar_ext", "gram.json")


def _read() -> dict:
    """Return what was measured; nothing of a file that is not as it was written."""
    try:
        found = json.loads(cache_file().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return {
        key: times
        for key, times in (found.items() if isinstance(found, dict) else ())
        if isinstance(times, dict) and all(isinstance(t, float) and t > 0 for t in times.values())
    }


def _write(key: str, times: Mapping[str, float]) -> None:
    """Note a measurement; where that can't be done the next process measures again."""
    with contextlib.suppress(OSError, RuntimeError, ImportError):
        from liar_ext.atomic_write import atomic_write  # which Windows has not what it needs for

        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(), key: times}, indent=1)
        with atomic_write(path) as file:
            file.write(text.encode())


chooser = Chooser()
