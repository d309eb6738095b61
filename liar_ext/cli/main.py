"""The ``liar`` command: from its arguments to its output and exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from liar_ext.cli import commands
from liar_ext.cli.options import (
    OPERATION,
    Parser,
    PrintCompletion,
    as_options,
    error_lines,
    painted,
)
from liar_ext.system.environment import launched
from liar_ext.system.errors import (
    InputError,
    did_you_mean,
    is_out_of_memory,
    one_line,
    printable,
    typed,
)

if TYPE_CHECKING:  # what imports torch is imported for a job alone
    from liar_ext.report.report import Report
    from liar_ext.system.distributed import RankLost

SHARED = ("prune", "calibrate", "heal", "resume")  # commands that several ranks can share
# Options of which each machine may have its own.
OWN = ("quiet", "json", "progress", "out", "bank", "checkpoint")
HEALED = ("before", "after", "tokens", "seconds")  # what JSON says of training


# Module and function of each command; they import torch, and return an exit code or None.
COMMANDS = {
    **{name: (name, "run") for name in ("prune", "calibrate", "resume", "heal")},
    **{name: ("info", f"run_{name}") for name in ("bench", "compare", "doctor", "export")},
    **{name: ("info", f"run_{name}") for name in ("families", "report", "verify")},
    "compare-methods": ("evaluate", "run_compare_methods"),
    "eval": ("evaluate", "run"),
    "merge": ("calibrate", "run_merge"),
    "sweep": ("calibrate", "run_sweep"),
}


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
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.of_command = names.choices
    for add_command in commands.COMMANDS:
        add_command(names)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; leave with exit code 2 if they can't be parsed.

    MODEL may be missing where a recipe names it, and argparse misses such an argument where an
    option stands before it.
    """
    top = parser()
    options, rest = top.parse_known_args(arguments)
    takes = ("prune", "calibrate", "sweep", "compare-methods")
    lacks = options.command in takes and not hasattr(options, "model")
    if lacks and len(rest) == 1 and not rest[0].startswith("-"):
        options.model, rest = rest[0], []
    if rest:
        known = top.of_command[options.command]
        given = rest[0].partition("=")[0]
        hint = did_you_mean(given, known._option_string_actions)
        what = "option" if rest[0].startswith("-") else "argument"
        known.error(f"unknown {what} {rest[0]}" + (f"; {hint}" if hint else ""))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done; 1: ``verify`` or ``doctor`` found a problem; 2: input that cannot be used, or too
    little memory for it; 3: another rank of torchrun ended; 130: interrupted; 141: whoever reads
    the output, such as ``head``, has enough of it.
    """
    _open_streams()
    # The first rank alone says what all would say alike.
    other = launched() and os.environ["RANK"] != "0"
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere) if other else nullcontext():
        options = parse(arguments)
    wanted = getattr(options, "progress", None)  # None: a command that takes no time
    options.quiet = other or getattr(options, "quiet", False)
    options.json = getattr(options, "json", False) and not other
    options.progress = wanted in ("auto", "plain") and not options.quiet
    # What follows imports torch; the version, the help and typos are answered without it.
    from liar_ext.checkpoint import register
    from liar_ext.system.distributed import tells
    from liar_ext.system.environment import errors_alone
    from liar_ext.system.progress import no_bars, plain_lines, showing_bars

    register()
    plain = wanted == "plain" or not sys.stderr.isatty()
    bars = showing_bars(options.progress)
    others = no_bars() if wanted and (plain or not options.progress) else nullcontext()
    alone = errors_alone() if other else nullcontext()
    try:
        with alone, shown(options.progress, options.quiet), plain_lines(plain), others, bars:
            code, error = _run(options)
    except BaseException:
        tells()  # so that the others don't
        raise
    if error is not None and tells():
        print(error_lines(error, options), file=sys.stderr, flush=True)
    return code


def _open_streams() -> None:
    """Let standard streams that are closed lead nowhere, before a file gets their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
        elif number:
            with suppress(AttributeError):
                getattr(sys, name).reconfigure(errors="replace")  # what can't be shown is a "?"


def _run(options: argparse.Namespace) -> tuple[int, object]:
    """Run the command; return its exit code, and what to say of it. A defect is raised."""
    from liar_ext.system.distributed import RankLost, leave

    try:
        meet(options)
        module, function = COMMANDS[options.command]
        code = getattr(import_module(f"liar_ext.cli.{module}"), function)(options) or 0
        print(end="", flush=True)
        leave()
        return code, None
    except KeyboardInterrupt:
        return 130, interrupted(options)
    except BrokenPipeError:  # what is left goes nowhere: Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, None
    except (InputError, OSError) as error:  # OSError: no permission, disk full, no such file
        return 2, error
    except RankLost as error:
        return 3, how_to_go_on(error, options)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error) or "out of memory"
        return 2, (
            f"{said.split('. ')[0]}; give smaller --batch-size or --memory, --dtype bfloat16, "
            "--device auto for several GPUs, or --max-memory to prune block by block"
        )


def meet(options: argparse.Namespace) -> None:
    """Meet the other ranks; raise InputError if a command can't be shared, or options differ."""
    from liar_ext.system import distributed
    from liar_ext.system.checkpoint_store import difference

    distributed.join()
    check_shared(options.command)
    own = {name: each for name, each in vars(options).items() if name not in OWN}
    first = distributed.broadcast(own)
    if first != own:
        raise InputError(
            f"{options.command}: every rank must have the same options, and rank 0 has "
            f"{difference('options', first, own)} at rank {distributed.rank()}"
        )


def check_shared(command: str) -> None:
    """Raise InputError if several ranks were started for a command that runs in one process."""
    from liar_ext.system.distributed import world_size

    if (count := world_size()) > 1 and command not in SHARED:
        raise InputError(
            f"{command}: runs in one process, and torchrun started {count}; only "
            f"liar {', '.join(SHARED)} can be shared"
        )


def interrupted(options: argparse.Namespace) -> str:
    """Return the line that says so, and how to go on if a checkpoint has the job."""
    from liar_ext.system.checkpoint_store import JOB_FILE, names_in

    checkpoint = getattr(options, "checkpoint", None)
    has_job = checkpoint and JOB_FILE in names_in(checkpoint)
    hint = f"; liar resume {typed(checkpoint)} goes on" if has_job else ""
    return f"{options.command}: interrupted{hint}"


def how_to_go_on(error: RankLost, options: argparse.Namespace) -> str:
    """Return the line that says that another rank is lost, and how to go on."""
    command, checkpoint = options.command, getattr(options, "checkpoint", None)
    count = "as many" if command == "heal" else "any number of"  # a rank has a part of its state
    return (
        f"{error}; no output was written, start the same command again, with {count} ranks"
        f"{f'; it goes on from {checkpoint}' if checkpoint else ''}"
    )


@contextmanager
def shown(progress: bool, quiet: bool) -> Iterator[None]:
    """Let warnings and logged progress be lines of stderr; ``quiet`` lets warnings go."""
    logger, handler = logging.getLogger("liar_ext"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.setLevel(logging.INFO if progress else logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore", UserWarning)
            else:  # a line for the user, also under python -W error
                warnings.filterwarnings("default", category=UserWarning, module="liar_ext")
            other = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
                if category is not UserWarning:
                    return other(message, category, *where)
                line = as_options(printable(" ".join(str(message).split())))
                said = OPERATION.sub("", line, count=1)
                print(painted("warning"), said, file=sys.stderr, flush=True)

            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def show(
    options: argparse.Namespace,
    facts: Mapping[str, object],
    lines: Sequence[str],
    notes: Sequence[str] | None = None,
) -> None:
    """Print facts with ``--json``, or lines; warn of ``notes``, which the JSON has as well."""
    if options.json:
        more = {} if notes is None else {"warnings": list(notes)}
        lines = [json.dumps({**facts, **more}, indent=1, default=str)]
    if lines:
        print("\n".join(lines), flush=True)
    for note in notes or ():
        warnings.warn(note, stacklevel=2)


def say(
    report: Report, options: argparse.Namespace, start: float, known: Sequence[str] = ()
) -> None:
    """Print what came out, and what to do with it; log it where that is asked for.

    The warnings that are ``known`` have been given before.
    """
    from liar_ext.report.tables import BYTES

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
            "heal": {each: report.heal[each] for each in HEALED} if report.heal else None,
            "worst_layer": worst and {"name": worst.name, "error": worst.holdout_error},
            "load": load,
            "seconds": seconds,
        }
        return show(options, facts, (), report.warnings)
    if options.quiet:
        return None
    before, after = (f"{megabytes[name]:,.1f} MB" for name in ("before", "after"))
    place, dense = typed(folder), report.dense_beside(folder)
    lines = [
        *report.lines(),
        f"{'weights':20} {before:>15} → {after:>15}",
        f"{'load':20} {load}",
        f"{'next':20} liar verify {place}",
        f"{'':20} liar bench {place} --against {dense}",
        f"{'':20} liar report {place}",
        f"{folder}: saved after {seconds:.0f} s",
    ]
    return show(options, {}, lines, [each for each in report.warnings if each not in known])


def log(report: Report, tracker: str, run: str) -> None:
    """Log the recipe and the numbers of a report as one run; a failure is a warning."""
    numbers = {part: getattr(report, part) for part in ("params", "evaluation", "seconds")}
    metrics = dict(_flat(numbers))
    try:
        library = import_module(tracker)
        if tracker == "wandb":
            with library.init(project="liar_ext", name=run, config=dict(report.choices)) as made:
                made.log(metrics)
        else:
            with library.start_run(run_name=run):
                library.log_params(dict(report.choices))
                library.log_metrics(metrics)
    except Exception as error:  # the model is saved, and a server may be away
        warnings.warn(f"--log {tracker}: nothing was logged: {one_line(error)}", stacklevel=2)


def _flat(facts: Mapping[str, object], above: str = "") -> Iterator[tuple[str, float]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif isinstance(value, int | float):
            yield f"{above}{name}", float(value)
