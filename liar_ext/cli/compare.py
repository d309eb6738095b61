"""``liar compare``: a page about several pruned models."""

from __future__ import annotations

import argparse

from liar_ext.benchmarking.stored import Benchmark
from liar_ext.errors import InputError


def run(options: argparse.Namespace) -> None:
    """Measure what is to be measured, write the page, and pictures; print where."""
    from liar_ext.report.compare import check, write_comparison

    check(options.folders, options.output)
    benches = measured(options) if options.measure else None
    for path in write_comparison(options.folders, options.output, options.png, benches):
        print(f"{path}: written")


def measured(options: argparse.Namespace) -> dict[str, Benchmark]:
    """Return a benchmark of each folder that has none stored; they are not stored either."""
    from liar_ext.benchmarking.job import benchmark
    from liar_ext.benchmarking.timing import Settings
    from liar_ext.report.page import stored_bench
    from liar_ext.report.reading import find_report

    benches = {}
    for folder in dict.fromkeys(options.folders):
        find_report(folder, "compare")  # refuses one without
        if stored_bench(folder)[0] is None:
            try:
                benches[folder] = benchmark(folder, None, Settings(batches=(1,)), memory=False)
            except InputError as error:
                raise InputError(f"compare: {folder} can't be measured: {error}") from error
    return benches
