"""What commands print of a result."""

from __future__ import annotations

import argparse
import time

from liar_ext.report.report import Report


def say(report: Report, options: argparse.Namespace, start: float) -> None:
    """Print what came out."""
    if not options.quiet:
        print(report.summary())
        print(f"{options.out}: saved after {time.perf_counter() - start:.0f} s")
