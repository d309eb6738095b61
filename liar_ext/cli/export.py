"""``liar export``, ``report``, ``compare`` and ``families``, which prune nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from liar_ext.cli.job_options import add_shown

# Options of the command that are no options of a format.
OWN = ("command", "folder", "to", "out", "overwrite", "quiet", "progress", "json")


def run(options: argparse.Namespace) -> None:
    """Export, and print what was written and how to load it."""
    from liar_ext.export import export

    own = {name: value for name, value in vars(options).items() if name not in OWN}
    done = export(
        options.folder,
        options.to,
        options.out,
        overwrite=options.overwrite,
        progress=options.progress,
        **own,
    )
    if options.json:
        print(json.dumps(asdict(done), indent=1, default=str))
        return
    for path in done.paths:
        print(f"{path}: {done.format}, {done.bytes / 1e6:,.1f} MB")
    if not options.quiet or not done.paths:
        for note in done.notes:
            print(note)


def add_export(
    commands: argparse._SubParsersAction, name: Callable[[str], str], number: Callable[[str], int]
) -> None:
    """Add the subcommand; ``name`` reads a name or path, ``number`` an integer from 1."""
    from liar_ext.export.formats import FORMATS

    formats = "; ".join(f"{each}: {row.what}" for each, row in FORMATS.items())
    parser = commands.add_parser(
        "export",
        help="write a folder in the format of another runtime",
        description="Write the model folder DIR, pruned or not, in another format, beside DIR by "
        "its name unless --out says otherwise. What a format cannot express is refused, with the "
        "reason and the alternative.",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", type=name, help="model folder")
    add("--to", required=True, choices=FORMATS, help=formats)
    add("--out", "-o", type=name, metavar="OUT", help="file or folder to write")
    add("--overwrite", action="store_true", help="replace OUT, if an export wrote it")
    suppress = {"default": argparse.SUPPRESS}
    add(
        "--quantize",
        type=name,
        metavar="TYPE",
        help="gguf: f32, f16, bf16, q8_0, ... (default: as the weights); onnx: int8 (default: "
        "float32)",
        **suppress,
    )
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="gguf: run the file with llama.cpp, if its library is installed (default: on)",
        **suppress,
    )
    add(
        "--multiple-of",
        type=number,
        metavar="N",
        help="uniform: round the padded MLP size up to a multiple of N",
        **suppress,
    )
    add_shown(parser, "no progress, no notes")


def add_families(commands: Any, name: Callable[[str], str]) -> None:
    """Add the subcommand to those of the parser."""
    parser = commands.add_parser(
        "families",
        help="which model families are known, and a row for one that isn't",
        description="Print what can be removed from the models of each family, and why something "
        "can't; or look for the row of a family that is lacking, prove it on tiny random models, "
        "and print it as Python code.",
    )
    add = parser.add_argument
    add(
        "--suggest",
        type=name,
        metavar="MODEL",
        help="propose a family definition for a model folder or hub id; only its config is read",
    )
    add("--json", action="store_true", help="print JSON")


def run_families(options: argparse.Namespace) -> None:
    """Print the table, or a proposed row."""
    if options.suggest:
        print(_suggestion(options.suggest, options.json))
        return
    from liar_ext.models.overview import overview, plain

    table = overview()
    if options.json:
        facts = {n: {key: each._asdict() for key, each in row.items()} for n, row in table.items()}
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(plain(table)))


def _suggestion(model: str, as_json: bool) -> str:
    """Return a row as Python code, with what is known of it in comments; or all as JSON."""
    from liar_ext.suggest.suggest import suggest_for

    found = suggest_for(model)
    if as_json:
        fields = {
            "family": found.family.name,
            "known": found.known,
            "code": found.code,
            "proved": found.proved,
            "missing": dict(found.family.without),
            "notes": found.notes,
        }
        return json.dumps(fields, indent=1)
    if found.known:
        said = [f"{found.family.name} is in the table of families; nothing was tried"]
    else:
        said = [f"{found.family.name}: proposed, and proved on tiny random models"]
    said += [f"proved: {each}" for each in found.proved]
    said += [f"lacking: {name}: {why}" for name, why in found.family.without.items()]
    said += [f"note: {each}" for each in found.notes]
    comments = [f"# {' '.join(line.split())}" for line in said]
    return "\n".join([*comments, found.code.rstrip()])


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
