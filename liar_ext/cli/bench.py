"""``liar bench``: speed and memory of a pruned model beside the dense one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from liar_ext.atomic_write import check_place, write_whole
from liar_ext.benchmarking.job import benchmark
from liar_ext.benchmarking.stored import Benchmark, bench_file, read_bench
from liar_ext.benchmarking.timing import Settings
from liar_ext.errors import InputError
from liar_ext.report.reading import report_digest
from liar_ext.report.tables import speed, to_text


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, and store the numbers."""
    target = place(options.folder, options.out)
    if target is not None:
        check_place(target, "bench", "--out", _is_benchmark)
    settings = Settings(
        rounds=options.rounds,
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        batches=tuple(dict.fromkeys(options.batch)),
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
    )
    found = benchmark(
        options.folder,
        options.against,
        settings,
        memory=options.memory,
        progress=options.progress,
    )
    print(found.to_json() if options.json else "\n".join(lines(found)))
    if target is not None:
        found = replace(found, report_digest=report_digest(options.folder))
        write_whole(target, found.to_json(), "bench", "--out")
        if not options.json:
            print(f"{target}: written")


def place(folder: str, given: str | None) -> Path | None:
    """Return where the numbers go: as told, or beside a folder, or nowhere for a hub id."""
    if given is not None:
        return Path(given)
    return bench_file(folder) if Path(folder).is_dir() else None


def lines(bench: Benchmark) -> list[str]:
    """Return a benchmark as a table of plain text."""
    table = speed(bench)
    return [*to_text(table), table.note]


def _is_benchmark(path: Path) -> bool:
    try:
        read_bench(path, "bench")
    except InputError:
        return False
    return True
