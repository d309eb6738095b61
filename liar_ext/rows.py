"""What happened at each site, and what a user has to know of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ON_HOST = "on the CPU, as the GPU had no room"  # ends the path of a solve
NO_ERROR = 1e-6  # a relative error that no site of a real model has
BY_BLOCKS = "by blocks in a file, as memory had no room"  # is in it


@dataclass(frozen=True)
class SiteRow:
    """What happened at one site.

    Errors are relative to ``tr(W G Wᵀ)``, the energy of the consumer's output; ``damp`` is λ, with
    infinity for plain dropping; ``condition`` is a lower bound on that of the solved matrix.
    ``target`` is what errors are measured to, and ``share`` how far towards it, from the site's own
    dense weight on its input, the solve was taken.
    ``holdout_error`` is cross-validated: solved on one half of the calibration documents and
    measured on the other, which λ is chosen by, too. ``certified_error`` is measured on text that
    no decision has seen; None where there was none.
    ``sensitivity`` is what the model's output loses per unit of relative error of the site, in
    nats; None where it was not measured.
    ``tokens`` is how many calibration tokens reached an expert; None where all do, and where it was
    kept as it is.
    A row that was read from a file has None for whatever the file doesn't say.
    """

    name: str
    units_before: int
    units_after: int
    params_before: int
    params_after: int
    damp: float
    error: float
    holdout_error: float
    condition: float
    dropped_rows: int
    path: str
    seconds: float
    target: str = "dense-input"
    share: float = 0.0
    sensitivity: float | None = None
    certified_error: float | None = None
    tokens: int | None = None

    @property
    def is_pruned(self) -> bool:
        """Whether units were removed, as far as it is known."""
        counts = self.units_before, self.units_after
        return None not in counts and self.units_after < self.units_before


def what_to_know(rows: Sequence[SiteRow], mode: str, tokens: int, widest: int) -> list[str]:
    """Return what a user has to know before trusting the result.

    ``mode`` is that of reconstruction, ``tokens`` are those of calibration, and ``widest`` counts
    the features of the widest site.
    """
    pruned = [row for row in rows if row.is_pruned]
    dropped = max((row.dropped_rows for row in rows), default=0)
    silent = all(row.error < NO_ERROR and row.holdout_error < NO_ERROR for row in pruned)
    unknown = [row.name for row in rows if not math.isfinite(row.error + row.holdout_error)]
    plainly = [row.name for row in pruned if math.isinf(row.damp) and mode not in ("none", "bias")]
    starved = [row for row in rows if row.tokens is not None and row.tokens < row.units_before]
    told = (  # whether, or at which sites; and what is said of them
        (
            dropped > 0,
            f"Up to {dropped} token rows per site held a non-finite value and were left out; "
            "calibrate in a wider dtype.",
        ),
        (
            unknown,
            "The errors of {names} ({count} sites) are not finite and say nothing; load the model "
            "in a wider dtype.",
        ),
        (
            bool(pruned) and silent,
            "Every error is 0: the activations do not vary over the calibration text, or the "
            "removed units did nothing. Give other text, and look at the model's weights.",
        ),
        (
            plainly,
            "The cross-validated error is least with plain dropping at {names} ({count} sites): "
            "give more calibration text.",
        ),
        (
            [f"{row.name} ({row.tokens})" for row in starved],
            "Fewer calibration tokens than the expert has channels reached {names} ({count} "
            "experts): their channels are chosen, and compensated for, by little or nothing; give "
            "more calibration text.",
        ),
        (
            [row.name for row in rows if row.path.endswith(ON_HOST)],
            "The GPU had no memory to solve {names} ({count} sites), so the CPU did.",
        ),
        (
            [row.name for row in rows if BY_BLOCKS in row.path],
            "An allocation failed in the solve of {names} ({count} sites), so it was done by "
            "blocks, in a file, more slowly: give more memory.",
        ),
        (
            tokens < 2 * widest,
            f"{tokens} calibration tokens are few for sites of {widest} features; the "
            "cross-validated errors say what that costs.",
        ),
    )
    return [
        said if of is True else said.format(names=_first(of), count=len(of))
        for of, said in told
        if of
    ]


def _first(names: Sequence[str]) -> str:
    """Return eight names at most."""
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
