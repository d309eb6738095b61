"""What commands write to stdout: a summary, or one JSON object."""

from __future__ import annotations

import argparse
import json
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence

from liar_ext.cli.tracking import log
from liar_ext.report.report import Report
from liar_ext.report.tables import BYTES


def say(report: Report, options: argparse.Namespace, start: float) -> None:
    """Print what came out, and what to do with it; log it where that is asked for."""
    if getattr(options, "log", None):
        log(report, options.log, options.out)
    seconds, folder = time.perf_counter() - start, options.out
    each = BYTES.get(report.dtype, 4) / 1e6
    megabytes = {name: report.params[name] * each for name in ("before", "after")}
    found = report.loader
    load = f'{found[0]}.from_pretrained("{folder}"{found[1]})' if found else report.loading
    if options.json:
        worst = report.worst_layer()
        facts = {
            "out": folder,
            "parameters": report.params,
            "megabytes": megabytes,
            "quality": report.evaluation or None,
            "worst_layer": worst and {"name": worst.name, "error": worst.holdout_error},
            "load": load,
            "seconds": seconds,
        }
        print_json(facts, report.warnings)
        return
    if options.quiet:
        return
    place, dense = shlex.quote(folder), shlex.quote(report.model)
    following = [
        f"liar verify {place}",
        f"liar bench {place} --against {dense}",
        f"liar report {place}",
    ]
    before, after = (f"{megabytes[name]:,.1f} MB" for name in ("before", "after"))
    lines = report.lines()
    lines.append(f"{'weights':20} {before:>15} → {after:>15}")
    lines += [f"{'load':20} {load}"]
    lines += [f"{'next' * (not at):20} {command}" for at, command in enumerate(following)]
    print("\n".join([*lines, f"{folder}: saved after {seconds:.0f} s"]), flush=True)
    warn(report.warnings)


def print_json(facts: Mapping[str, object], notes: Sequence[str]) -> None:
    """Print facts as one JSON object with the warnings, which go to stderr as well."""
    print(json.dumps({**facts, "warnings": list(notes)}, indent=1, default=str), flush=True)
    warn(notes)


def print_estimate(lines: Sequence[str], options: argparse.Namespace) -> None:
    """Print the lines of a dry run."""
    print(json.dumps({"dry_run": lines}, indent=1) if options.json else "\n".join(lines))


def warn(notes: Sequence[str]) -> None:
    """Warn of what a user has to know."""
    for note in notes:
        warnings.warn(note, stacklevel=2)
