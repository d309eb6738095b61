"""``liar compare``: a page about several pruned models."""

from __future__ import annotations

import argparse

from liar_ext.report.compare import write_comparison


def run(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    for path in write_comparison(options.folders, options.out, options.png):
        print(f"{path}: written")
