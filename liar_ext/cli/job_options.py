"""The options of the commands that calibrate, of `sweep`, `resume` and `heal`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from liar_ext.cli.fields import add_field, add_fields, at_least, read_name, read_number
from liar_ext.healing import TRAIN
from liar_ext.recipe.checks import shown
from liar_ext.recipe.fields import PRESETS, recipe_fields

BANK_HELP = "reuse the activation statistics and the text of a file written by liar calibrate"


def add_calibrate(commands: argparse._SubParsersAction) -> None:
    """Add ``liar calibrate``."""
    parser = commands.add_parser(
        "calibrate",
        help="sum the activation statistics of a model into a file, a moment bank",
        usage="liar calibrate MODEL --calibration TEXT [TEXT ...] --out FILE [options]",
        description="Run MODEL once over the calibration text and write the sums that pruning "
        "needs, so that liar prune and liar sweep decide and solve by them in seconds, any number "
        "of times. liar merge adds the banks of several texts or machines.",
        epilog="Example: liar calibrate gpt2 --calibration text.txt --out gpt2.bank",
    )
    add_fields(parser, recipe_fields(group="model") + recipe_fields(in_bank="text"), "bank")
    sensitivities = parser.add_argument_group("Sensitivities")
    for each in recipe_fields(in_bank="sensitivities"):
        add_field(sensitivities, each)
    sensitivities.add_argument(
        "--sensitivities",
        action="store_true",
        help="also measure sensitivities, with 0.8 kept; a sweep then never runs the model",
    )
    output = parser.add_argument_group("Output")
    add_checkpoint(output, "statistics and divergences")
    add = output.add_argument
    add("--out", "-o", dest="bank", type=read_name, metavar="FILE", help="file to write")
    add("--bank", type=read_name, help=argparse.SUPPRESS)
    output.add_argument(
        "--no-text",
        action="store_true",
        help="do not store token ids; steps that run the model over the text are then rejected",
    )
    _add_writing(output, "FILE, if it is a bank")


def add_checkpoint(group: argparse._ArgumentGroup, what: str) -> None:
    """Add ``--checkpoint``, which saves ``what``."""
    group.add_argument(
        "--checkpoint",
        type=read_name,
        metavar="DIR",
        help=f"save {what} in DIR; resume with the same command or liar resume DIR",
    )


def add_resume(commands: argparse._SubParsersAction) -> None:
    """Add ``liar resume``."""
    parser = commands.add_parser(
        "resume",
        help="go on with a job that was stopped",
        description="Say what the checkpoint DIR holds and go on with its job, a liar calibrate or "
        "liar prune with --checkpoint DIR, in the folder that it was started in. Run it only on "
        "checkpoints that you trust: like a script, one says what is read and where results go.",
    )
    parser.add_argument("folder", metavar="DIR", type=read_name, help="a checkpoint")
    _add_writing(parser, "what the job writes, if it is there already")


def add_merge(commands: argparse._SubParsersAction) -> None:
    """Add ``liar merge``."""
    parser = commands.add_parser(
        "merge",
        help="add moment banks of one model: shards, data sets, machines",
        description="Write the sum of the banks A, B, ... of one model. Counts add up exactly, "
        "sums in float64; the order of the arguments changes no bit. Banks that have text in "
        "common are refused.",
    )
    add = parser.add_argument
    add("banks", metavar="BANK", type=read_name, nargs="+", help="file written by liar calibrate")
    add("-o", "--out", metavar="FILE", type=read_name, required=True, help="bank to write")
    add("--overwrite", action="store_true", help="replace FILE, if it is a bank")
    add("--quiet", action="store_true", help="no summary")


def add_sweep(
    commands: argparse._SubParsersAction, add_start: Callable[[argparse._ArgumentGroup], None]
) -> None:
    """Add ``liar sweep``; ``add_start`` adds the options that say where a recipe begins."""
    parser = commands.add_parser(
        "sweep",
        help="several budgets from one calibration: a table, and pruned models",
        usage="liar sweep MODEL --bank FILE [--keep F ...] [-o DIR] [options]",
        description="Decide what each budget keeps and print a table of predicted divergence, "
        "parameters, operations and, with --eval, perplexity. With --out the pruned models are "
        "written, too, a folder for each budget. Scores, error curves and sensitivities are "
        "computed once.",
        epilog="Example: liar sweep gpt2 --bank gpt2.bank --keep 0.9 0.7 0.5 --out sweep",
    )
    job = parser.add_argument_group("Job")
    add_start(job)
    job.add_argument(
        "--keep",
        type=read_number,
        nargs="+",
        default=[0.9, 0.8, 0.7, 0.6, 0.5],
        metavar="F",
        help="fractions to keep (default: 0.9 0.8 0.7 0.6 0.5)",
    )
    chosen = [each for each in recipe_fields(with_bank=True) if each.name != "keep"]
    add_fields(parser, chosen, "bank", "keep", "out", "preset")
    output = parser.add_argument_group("Output")
    output.add_argument(
        "-o",
        "--out",
        type=read_name,
        metavar="DIR",
        help="also write pruned models: DIR/keep-0.9 and so on",
    )
    _add_writing(output, "folders of pruned models in DIR")


def add_compare_methods(commands: argparse._SubParsersAction) -> None:
    """Add ``liar compare-methods``."""
    parser = commands.add_parser(
        "compare-methods",
        help="perplexity of several pruning methods on one model, over several seeds",
        usage="liar compare-methods MODEL --calibration TEXT --eval TEXT [options]",
        description="Prune a copy of MODEL by each method and seed, and print a table of "
        "perplexity: the mean over seeds, the lowest and the highest. Methods on the same "
        "calibration text share its statistics. Nothing is saved.",
        epilog="Example: liar compare-methods gpt2 --calibration text.txt --eval held_out.txt",
    )
    methods, seeds = ["flap", "wanda-sp", "liar"], [0, 1]
    add = parser.add_argument_group("Methods").add_argument
    help = f"presets, and liar for balanced (default: {' '.join(methods)})"
    add("--methods", nargs="+", choices=("liar", *PRESETS), default=methods, help=help)
    add("--seeds", type=at_least(0), nargs="+", default=seeds, metavar="N", help="random seeds")
    chosen = [each for each in recipe_fields() if each.name not in ("seed", "certify")]
    add_fields(parser, chosen, "methods", "seeds")
    add_shown(parser.add_argument_group("Output"), "no progress")


def _add_writing(group: argparse._ActionsContainer, what: str) -> None:
    group.add_argument("--overwrite", action="store_true", help=f"replace {what}")
    add_shown(group, "no progress, no summary, no warnings")


def add_shown(group: argparse._ActionsContainer, quiet: str) -> None:
    """Add what a command shows; ``quiet`` is the help of ``--quiet``."""
    add = group.add_argument
    add(
        "--progress",
        choices=("auto", "plain", "none"),
        default="auto",
        help="auto: a bar in a terminal, else a line every 30 s; plain: lines also in a terminal",
    )
    add("--quiet", action="store_true", help=quiet)
    add("--json", action="store_true", help="print one JSON object and nothing else")


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
