"""``liar report``: a page about one pruned model."""

from __future__ import annotations

import argparse


def run(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    from liar_ext.report.page import write_page

    for path in write_page(options.folder, options.out, options.png):
        print(f"{path}: written")
