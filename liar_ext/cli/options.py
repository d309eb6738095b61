"""The options of the ``liar`` command; those of ``prune`` are the fields of a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from liar_ext.cli.export import add_export, add_families
from liar_ext.cli.fields import (
    PrintCompletion,
    add_fields,
    at_least,
    read_name,
    read_names,
    read_size,
)
from liar_ext.cli.job_options import (
    BANK_HELP,
    add_calibrate,
    add_checkpoint,
    add_compare_methods,
    add_heal,
    add_merge,
    add_resume,
    add_shown,
    add_sweep,
)
from liar_ext.cli.messages import TRACKERS, error_lines, read_tracker
from liar_ext.errors import did_you_mean
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import DTYPES, PRESETS, recipe_fields


class Parser(argparse.ArgumentParser):
    """A parser whose errors are what is wrong, and what to type.

    ``--help`` shows the ``common`` options by their destinations, if there are any, or all.
    """

    common: tuple[str, ...] = ()

    def print_help(self, file: Any = None) -> None:
        """Print the common options, if the parser knows them, or all."""
        if not self.common:
            return self.print_all(file)
        formatter, shown = self._get_formatter(), (*self.common, "help", "help_all")
        actions = [each for each in self._actions if each.dest in shown]
        formatter.add_usage(self.usage, self._actions, ())
        formatter.add_text(self.description)
        formatter.start_section("Common options")
        formatter.add_arguments(sorted(actions, key=lambda each: shown.index(each.dest)))
        formatter.end_section()
        formatter.add_text(self.epilog)
        self._print_message(formatter.format_help(), file or sys.stdout)

    def print_all(self, file: Any = None) -> None:
        """Print all options."""
        super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Print an error and a hint, and leave with exit code 2."""
        hint = "" if "; " in message else f"; {self.prog} --help shows what it takes"
        self.exit(2, error_lines(message + hint) + "\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        if not action.option_strings:
            hint = did_you_mean(value, action.choices, "liar --help lists them")
            self.error(f"there is no command {value}; {hint}")
        names = ", ".join(action.choices)
        hint = did_you_mean(value, action.choices, f"{self.prog} --help describes them")
        self.error(
            f"{'/'.join(action.option_strings)} must be one of {names}, got {value!r}; {hint}"
        )


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the name of the command as ``command``."""
    parser = Parser(
        prog="liar",
        description="Prune transformers without retraining: remove attention heads and MLP "
        "channels, and compensate for them in the weights that stay.",
        epilog="liar prune MODEL --calibration TEXT --out DIR is all that a first run needs.",
    )
    parser.add_argument("--version", action="version", version=f"liar_ext {version('liar_ext')}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh"),
        action=PrintCompletion,
        default=argparse.SUPPRESS,
        help="print a script that completes liar in a shell",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.of_command = commands.choices
    _add_prune(commands)
    add_calibrate(commands)
    add_merge(commands)
    add_resume(commands)
    add_sweep(commands, _add_start)
    add_heal(commands)
    _add_eval(commands)
    _add_verify(commands)
    _add_bench(commands)
    _add_report(commands)
    _add_compare(commands)
    add_compare_methods(commands)
    add_export(commands, read_name, at_least(1))
    add_families(commands, read_name)
    info = commands.add_parser("info", help="versions, kernels in use, what can be loaded")
    info.add_argument("--json", action="store_true", help="print JSON")
    doctor = commands.add_parser("doctor", help="check that this installation works here")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; leave with exit code 2 if they can't be parsed.

    MODEL may be missing where a recipe names it, and argparse misses such an argument where an
    option stands before it.
    """
    commands = parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        commands.print_help(sys.stderr)
        commands.error("no command was given; name one of those above")
    options, rest = commands.parse_known_args(arguments)
    takes = ("prune", "calibrate", "sweep", "compare-methods")
    lacks = options.command in takes and not hasattr(options, "model")
    if lacks and len(rest) == 1 and not rest[0].startswith("-"):
        options.model, rest = rest[0], []
    if rest:
        known = commands.of_command[options.command]
        hint = did_you_mean(rest[0].partition("=")[0], known._option_string_actions)
        what = "option" if rest[0].startswith("-") else "argument"
        known.error(f"unknown {what} {rest[0]}" + (f"; {hint}" if hint else ""))
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe: a file's or a preset's, with what the options say on top.

    Raises
    ------
    InputError
        If the recipe can't be.
    """
    path = getattr(options, "recipe", None)
    start = Recipe.load(path) if path else Recipe.preset(getattr(options, "preset", "balanced"))
    given = {
        each.name: getattr(options, each.name)
        for each in recipe_fields()
        if hasattr(options, each.name)
    }
    return Recipe.build(start, **given)


def _add_prune(commands) -> None:
    parser = commands.add_parser(
        "prune",
        help="prune a model, reconstruct, save it",
        usage="liar prune MODEL --calibration TEXT [TEXT ...] --out DIR [options]",
        description="Prune MODEL, compensate for what was removed by activation statistics of the "
        "calibration text, and write an ordinary model folder with a report. Three arguments are "
        "enough: MODEL, --calibration and --out; every other option has a default that was "
        "measured.",
        epilog="Example: liar prune gpt2 --calibration text.txt --keep 0.5 --out gpt2-half",
    )
    _add_job(parser.add_argument_group("Job"))
    add_fields(parser, recipe_fields(), "out", "preset", "max_memory")
    output = parser.add_argument_group("Output")
    output.add_argument("--out", "-o", type=read_name, metavar="DIR", help="folder to write")
    add_checkpoint(output, "progress")
    output.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    add_shown(output, "no progress, no summary, no warnings")
    output.add_argument(
        "--log",
        type=read_tracker,
        choices=TRACKERS,
        help="log recipe, sizes, perplexity and seconds as a run of MLflow or Weights & Biases",
    )


def _add_job(group: argparse._ArgumentGroup) -> None:
    _add_start(group)
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the plan: sizes, memory, passes, minutes, how the result loads",
    )
    group.add_argument(
        "--max-memory",
        type=read_size,
        metavar="SIZE",
        help="prune a model larger than memory block by block, in at most SIZE, such as 12GiB",
    )


def _add_start(group: argparse._ArgumentGroup) -> None:
    start = group.add_mutually_exclusive_group()
    start.add_argument(
        "--preset",
        choices=PRESETS,
        default="balanced",
        help="trade run time for quality (default: balanced)",
    )
    start.add_argument(
        "--recipe",
        type=read_name,
        metavar="FILE",
        help="settings of an earlier run, DIR/liar/recipe.yaml; options override them",
    )
    group.add_argument("--bank", type=read_name, metavar="FILE", help=BANK_HELP)


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="quality of a model on a text, or tasks of lm-eval",
        description="Cut TEXT into windows of --seq-len tokens and print the model's perplexity; "
        "of an encoder, print how much it keeps of the dense model's embeddings or predictions; "
        "or run tasks of lm-eval, and print its table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=read_name, help="model folder, hub id, or GGUF file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--text",
        type=read_name,
        help="as for prune --calibration; transcripts beside recordings give the word error rate",
    )
    what.add_argument(
        "--tasks", type=read_names, metavar="TASK[,...]", help="tasks, groups or tags of lm-eval"
    )
    add(
        "--against",
        type=read_name,
        metavar="DENSE",
        help="encoders: the dense model (default: the one that the report names)",
    )
    add(
        "--pairs",
        type=read_name,
        metavar="FILE",
        help="encoders: lines of two texts and a score, or two texts that belong together",
    )
    add(
        "--include-path",
        type=read_name,
        metavar="DIR",
        help="tasks: folder of task files (YAML); their Python functions (!function) are run",
    )
    add("--limit", type=at_least(1), metavar="N", help="tasks: use the first N items of each")
    add("--num-fewshot", type=at_least(0), metavar="N", help="tasks: examples in each prompt")
    add("--out", "-o", type=read_name, metavar="FILE", help="also write the result as JSON")
    add("--output", dest="out", type=read_name, help=argparse.SUPPRESS)
    add("--samples", type=at_least(1), metavar="N", help="use N evenly spread windows")
    add("--seq-len", type=at_least(2), default=512, metavar="N", help="tokens per window")
    add(
        "--batch-size",
        type=at_least(1),
        default=4,
        metavar="N",
        help="windows, or requests, per forward pass",
    )
    add("--dtype", choices=DTYPES, default="float32", help="data type of the weights")
    add("--device", default="cpu", type=read_name, help="cpu, cuda, cuda:1, ...; auto: all GPUs")
    add_shown(parser, "no progress")


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="reload a pruned model and compare its outputs with those it was saved with",
        description="Reload DIR by every loader that it is meant for, and each of its exports, in "
        "processes of their own; compare the outputs with those recorded when it was saved.",
    )
    parser.add_argument("folder", metavar="DIR", type=read_name)
    parser.add_argument("--text", type=read_name, help="also measure perplexity on it")
    parser.add_argument("--device", default="cpu", type=read_name, help="device to run on")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_bench(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed and memory of a pruned model beside the dense one",
        description="Time prompts (prefill, first token) and greedy decoding of DIR and MODEL in "
        "alternating rounds, encoders by inputs per second, and print medians with the quartiles "
        "of pruned / dense. Peak resident memory is that of a process of its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", type=read_name, help="pruned model")
    add("--against", required=True, metavar="MODEL", type=read_name, help="the dense model")
    add("--rounds", type=at_least(1), default=5, metavar="N", help="timed rounds")
    add("--prompt-length", type=at_least(1), default=128, metavar="N", help="tokens of a prompt")
    add("--new-tokens", type=at_least(1), default=32, metavar="N", help="tokens to decode")
    add("--batch", type=at_least(1), nargs="+", default=[1, 32], metavar="N", help="batch sizes")
    add("--dtype", choices=DTYPES, default="float32", help="data type of the weights")
    add("--device", default="cpu", type=read_name, help="cpu, cuda, cuda:1, ...; auto: all GPUs")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads of torch")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory")
    add("--out", "-o", metavar="FILE", type=read_name, help="file for the numbers (DIR.bench.json)")
    add_shown(parser, "no progress")


def _add_report(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page about a pruned model, with pictures",
        description="Write one HTML page about DIR that needs no other file: sizes, perplexity, "
        "units kept and errors per layer, time spent and, after liar bench, speed.",
    )
    parser.add_argument("folder", metavar="DIR", type=read_name)
    _add_page(parser, "DIR.html, beside DIR", None)


def _add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="write a page that compares pruned models",
        description="Write one HTML page about several pruned models: perplexity and speed "
        "against parameters. Speed is what liar bench stored.",
    )
    parser.add_argument("folders", metavar="DIR", type=read_name, nargs="+")
    _add_page(parser, "compare.html", "compare.html")


def _add_page(parser: argparse.ArgumentParser, where: str, default: str | None) -> None:
    add = parser.add_argument
    add(
        "--out",
        "-o",
        metavar="FILE",
        type=read_name,
        default=default,
        help=f"page to write (default: {where})",
    )
    add("--output", dest="out", default=default, type=read_name, help=argparse.SUPPRESS)
    add("--png", metavar="FOLDER", type=read_name, help="also write the pictures as PNG")
