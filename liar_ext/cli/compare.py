"""``liar compare``: a page about several pruned models."""

from __future__ import annotations

import argparse


def run(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    from liar_ext.report.compare import write_comparison

    for path in write_comparison(options.folders, options.out, options.png):
        print(f"{path}: written")
