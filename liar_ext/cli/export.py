"""``liar export``, ``report``, ``compare`` and ``families``, which prune nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from liar_ext.cli.output import show

# Options of the command that are no options of a format.
OWN = ("command", "folder", "to", "out", "overwrite", "quiet", "progress", "json")


def run(options: argparse.Namespace) -> None:
    """Export, and print what was written and how to load it."""
    from liar_ext.export import export

    own = {name: value for name, value in vars(options).items() if name not in OWN}
    own |= {"overwrite": options.overwrite, "progress": options.progress}
    done = export(options.folder, options.to, options.out, **own)
    lines = [f"{path}: {done.format}, {done.bytes / 1e6:,.1f} MB" for path in done.paths]
    if not options.quiet or not done.paths:
        lines += done.notes
    show(options, asdict(done), lines)


def run_families(options: argparse.Namespace) -> None:
    """Print the table, or a proposed row."""
    if options.suggest:
        return _suggest(options)
    from liar_ext.models.registry import overview, plain

    table = overview()
    facts = {n: {key: each._asdict() for key, each in row.items()} for n, row in table.items()}
    return show(options, facts, plain(table))


def _suggest(options: argparse.Namespace) -> None:
    """Print a row as Python code, with what is known of it in comments; or all as JSON."""
    from liar_ext.suggest.suggest import suggest_for

    found = suggest_for(options.suggest)
    name, missing = found.family.name, dict(found.family.without)
    facts = {"family": name, "known": found.known, "code": found.code, "proved": found.proved}
    facts |= {"missing": missing, "notes": found.notes}
    said = [f"{name}: proposed, and proved on tiny random models"]
    if found.known:
        said = [f"{name} is in the table of families; nothing was tried"]
    said += [f"proved: {each}" for each in found.proved]
    said += [f"lacking: {each}: {why}" for each, why in missing.items()]
    said += [f"note: {each}" for each in found.notes]
    comments = [f"# {' '.join(line.split())}" for line in said]
    show(options, facts, [*comments, found.code.rstrip()])


def run_report(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    from liar_ext.report.page import write_page

    for path in write_page(options.folder, options.out, options.png):
        print(f"{path}: written")


def run_compare(options: argparse.Namespace) -> None:
    """Write the page, and pictures; print where."""
    from liar_ext.report.compare import write_comparison

    for path in write_comparison(options.folders, options.out, options.png):
        print(f"{path}: written")
