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


# What a user has to know before trusting a result, with the sites that it concerns.
TOLD = {
    "dropped": "Up to {dropped} token rows per site held a non-finite value and were left out; "
    "calibrate in a wider dtype.",
    "unknown": "The errors of {names} are not finite and say nothing; load the model in a wider "
    "dtype.",
    "silent": "Every error is 0: the activations do not vary over the calibration text, or the "
    "removed units did nothing. Give other text, and look at the model's weights.",
    "plainly": "The cross-validated error is least with plain dropping at {names}: give more "
    "calibration text.",
    "starved": "Fewer calibration tokens than the expert has channels reached {names}: their "
    "channels are chosen, and compensated for, by little or nothing; give more calibration text.",
    "on host": "The GPU had no memory to solve {names}, so the CPU did.",
    "by blocks": "An allocation failed in the solve of {names}, so it was done by blocks, in a "
    "file, more slowly: give more memory.",
    "few": "{tokens} calibration tokens are few for sites of {widest} features; the "
    "cross-validated errors say what that costs.",
}


def what_to_know(rows: Sequence[SiteRow], mode: str, tokens: int, widest: int) -> list[str]:
    """Return those of ``TOLD`` that hold.

    ``mode`` is that of reconstruction, ``tokens`` are those of calibration, and ``widest`` counts
    the features of the widest site.
    """
    pruned, kept_plain = [row for row in rows if row.is_pruned], mode in ("none", "bias")
    dropped = max((row.dropped_rows for row in rows), default=0)
    silent = all(row.error < NO_ERROR and row.holdout_error < NO_ERROR for row in pruned)
    few = [row for row in rows if row.tokens is not None and row.tokens < row.units_before]
    found = {  # at which sites; of all of them there are no names
        "dropped": dropped > 0,
        "unknown": [r.name for r in rows if not math.isfinite(r.error + r.holdout_error)],
        "silent": bool(pruned) and silent,
        "plainly": [r.name for r in pruned if math.isinf(r.damp) and not kept_plain],
        "starved": [f"{row.name} ({row.tokens})" for row in few],
        "on host": [row.name for row in rows if row.path.endswith(ON_HOST)],
        "by blocks": [row.name for row in rows if BY_BLOCKS in row.path],
        "few": tokens < 2 * widest,
    }
    numbers = {"dropped": dropped, "tokens": tokens, "widest": widest}
    told = []
    for name, at in found.items():
        names = at if isinstance(at, list) else []
        some = ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
        told += [TOLD[name].format(names=some, **numbers)] * bool(at)
    return told
