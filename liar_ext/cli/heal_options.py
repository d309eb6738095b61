"""The options of ``liar heal``."""

from __future__ import annotations

import argparse
import re

from liar_ext.cli.bank_options import add_shown
from liar_ext.cli.fields import add_field, at_least, read_name, read_number
from liar_ext.healing import TRAIN
from liar_ext.recipe.checks import shown
from liar_ext.recipe.fields import recipe_fields

# Fields of the recipe that are options here, too, as the recipe of the folder has them by default.
FIELDS = ("calibration", "self_text", "eval", "seq_len", "batch_size", "seed", "device")


def add_heal(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "heal",
        help="train a pruned folder for a short while towards its dense model",
        usage="liar heal DIR (--tokens N | --minutes N | --steps N) [options]",
        description="Distil the dense model into the pruned folder DIR: train on the calibration "
        "text, without labels, and keep the state that is best on held-out text. Optional: pruning "
        "needs no training. DIR is replaced, unless --out is given.",
        epilog="Example: liar heal gpt2-half --tokens 100k --out gpt2-half-healed",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", type=read_name, help="folder written by liar prune")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=_count, metavar="N", help="train on N tokens, as 100k, 2M")
    budget.add_argument("--minutes", type=_above_zero, metavar="N", help="train for N minutes")
    budget.add_argument("--steps", type=at_least(1), metavar="N", help="train for N steps")
    add(
        "--train",
        choices=TRAIN,
        default="no-embeddings",
        help="weights to train (default: %(default)s)",
    )
    add("--lr", type=_above_zero, default=1e-4, help="highest learning rate (default: %(default)s)")
    add(
        "--grad-accumulation",
        type=at_least(1),
        default=1,
        metavar="N",
        help="batches per step (default: %(default)s)",
    )
    text = parser.add_argument_group("Models and text (default: those of the pruning job)")
    text.add_argument("--teacher", type=read_name, metavar="MODEL", help="the dense model")
    for each in recipe_fields():
        if each.name in FIELDS:
            add_field(text, each)
    for action in text._group_actions:
        action.help = re.sub(r" \(default: [^)]*\)$", "", action.help)
    output = parser.add_argument_group("Output")
    output.add_argument(
        "--out", "-o", type=read_name, metavar="OUT", help="write OUT, and keep DIR"
    )
    output.add_argument(
        "--checkpoint",
        type=read_name,
        metavar="DIR",
        help="save progress in DIR; resume with the same command",
    )
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    add_shown(output, "no progress, no summary")


def _count(text: str) -> int:
    """Read a count such as 20000, 100k or 2M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    value = float(found[1]) * {"": 1, "k": 1000, "M": 1_000_000}[found[2]] if found else 0
    if not 1 <= value < 2**53:
        raise argparse.ArgumentTypeError(
            f"must be a number of at least 1, such as 20000, 100k or 2M, got {shown(text)}"
        )
    return int(value)


def _above_zero(text: str) -> float:
    value = read_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {shown(text)}")
    return value
