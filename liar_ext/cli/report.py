"""``liar report``: a page about one pruned model."""

from __future__ import annotations

import argparse

from liar_ext.report.page import write_page


def run(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    for path in write_page(options.folder, options.out, options.png):
        print(f"{path}: written")
