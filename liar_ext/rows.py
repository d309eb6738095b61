"""What a report says of one site."""

from __future__ import annotations

from dataclasses import dataclass

ON_HOST = "on the CPU, as the GPU had no room"  # ends the path of a solve
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
