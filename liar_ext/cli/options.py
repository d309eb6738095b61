"""The options of the ``liar`` command."""

from __future__ import annotations

import argparse

from liar_ext.plan import BUDGET_UNITS
from liar_ext.selection.criteria import list_criteria

DTYPES = ("float32", "bfloat16", "float16", "float64")


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the name of the command as ``command``."""
    parser = argparse.ArgumentParser(
        prog="liar",
        description="Prune transformers without retraining: remove attention heads and MLP "
        "channels and fold what they did into the weights that stay.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_eval(commands)
    _add_verify(commands)
    commands.add_parser("info", help="versions, kernels in use, what can be loaded")
    return parser


def _add_prune(commands) -> None:
    parser = commands.add_parser(
        "prune",
        help="prune a model, reconstruct, save it",
        description="Prune MODEL, reconstruct what was removed from activation statistics of the "
        "calibration text, and write an ordinary model folder with a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser)
    add = parser.add_argument
    add(
        "--calibration",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="text files, .jsonl files with a field text, folders of text files, or names of the "
        "datasets library (NAME[:CONFIG[:SPLIT]]); sequences are drawn evenly from all",
    )
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace DIR if it exists")
    add("--keep", type=float, default=0.8, help="fraction to keep, in (0, 1]")
    add("--of", choices=BUDGET_UNITS, default="prunable", help="what the fraction counts")
    add("--multiple-of", type=int, default=1, metavar="N", help="kept features per site")
    add("--at-least", type=int, default=1, metavar="N", help="units that every site keeps")
    add(
        "--uniform-layers",
        action="store_true",
        help="all layers keep equally many units, so that stock loaders take the result",
    )
    add(
        "--keep-hidden",
        type=float,
        default=1.0,
        metavar="F",
        help="fraction of the hidden size to keep; narrowed first, and --keep counts the rest. Use "
        "--keep 1 to narrow only. Takes two passes over the calibration text, more where the sums "
        "of all norms are over 8 GiB, or --memory",
    )
    add(
        "--sites",
        choices=("all", "attn", "mlp"),
        default="all",
        help="sites that may be pruned; prunable parameters are theirs",
    )
    add(
        "--attn-unit",
        choices=("auto", "kv_group", "head"),
        default="auto",
        help="attention unit; auto takes KV groups where query heads share keys",
    )
    add(
        "--criterion",
        default="wifv",
        metavar="NAME",
        help="importance score: " + ", ".join(known.name for known in list_criteria()),
    )
    add(
        "--allocation",
        choices=("uniform", "global", "curve"),
        default="curve",
        help="distribution of the ratio: the same everywhere, by standardised scores, or by error "
        "curves and the measured sensitivity of each site (a few more forward passes)",
    )
    add(
        "--refine",
        type=int,
        default=0,
        metavar="N",
        help="curve: measure N whole plans more, and keep the best",
    )
    add(
        "--reconstruct",
        choices=("auto", "none", "bias", "linear", "affine"),
        default="auto",
        help="error compensation: none, means (bias), a linear map of what stays, both (affine); "
        "auto is affine where a consumer has a bias and linear elsewhere; bias and affine give "
        "consumers a bias if they lack one",
    )
    add("--damp", default="auto", metavar="LAMBDA", help="ridge, or auto: by held-out error")
    add(
        "--schedule",
        choices=("one-pass", "layerwise"),
        default="one-pass",
        help="solve all layers on the dense model's activations, or walk them on the pruned one's",
    )
    add(
        "--target",
        choices=("dense-input", "branch", "stream", "auto"),
        help="layerwise: restore what a layer loses, its dense output, the dense residual stream, "
        "or as much of the latter as held-out text supports (auto, the default)",
    )
    add("--refit", action="store_true", help="layerwise: solve layers that lose nothing, too")
    add("--samples", type=int, default=128, help="calibration sequences")
    add("--batch-size", type=int, default=4, help="sequences per forward pass")
    add("--seed", type=int, default=0, help="of the draw and the folds")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="for sums over the calibration text at a time, 16 d² bytes for a layer of d inputs: "
        "what needs more is summed in groups of layers, with more passes and the same result "
        "(default: 32, or half of what is free)",
    )
    add("--eval", metavar="TEXT", help="held-out text: report perplexity before and after")
    add("--eval-samples", type=int, metavar="N", help="evaluate on N windows, evenly spread")


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity of a model on a text",
        description="Cut TEXT into windows of --seq-len tokens and print the model's perplexity.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("--text", required=True, help="as for prune --calibration")
    parser.add_argument("--samples", type=int, metavar="N", help="N windows, evenly spread")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per forward pass")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="reload a pruned model and compare its outputs with those it was saved with",
        description="Reload DIR by every loader that it is meant for, compare the outputs with "
        "those recorded when it was saved, and count its parameters.",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, hub id, or GGUF file")
    add("--seq-len", type=int, default=512, help="tokens per sequence")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...; auto: spread over all")
    add("--quiet", action="store_true", help="no progress bars")
