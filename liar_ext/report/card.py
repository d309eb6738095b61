"""What a model card says of how a model was pruned."""

from __future__ import annotations

from typing import Any

from liar_ext.report.tables import plain
from liar_ext.report.vocabulary import vocabulary_lines
from liar_ext.untrusted import count


def method(report: Any, again: str) -> list[str]:
    """Return how units and tokens were removed, as lines of Markdown."""
    known, lines = {**report.choices, **report.settings}, []
    if report.sites or report.hidden or not report.vocabulary:
        lines = [
            f"Pruned{again}: the units that stay interpolate the removed ones (LIAR, arXiv "
            "2407.13331), and the interpolation is folded into the weights.",
            "",
            f"Importance: `{known.get('criterion')}`. Allocation: `{known.get('allocation')}`. "
            f"Reconstruction: `{known.get('reconstruct')}`, {known.get('schedule')}, from "
            f"{count(known.get('calibration_tokens')) or 0:,} calibration tokens.",
        ]
    if report.vocabulary:
        lines += [""] * bool(lines) + [plain(" ".join(vocabulary_lines(report.vocabulary)))]
    return lines
