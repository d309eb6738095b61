"""``liar export``: write a folder in the format of another runtime."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from liar_ext.cli.bank_options import add_shown

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
