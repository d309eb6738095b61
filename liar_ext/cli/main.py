"""The ``liar`` command."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version

from liar_ext.cli import commands
from liar_ext.cli.messages import error_lines, is_other, shown
from liar_ext.cli.options import Parser, PrintCompletion
from liar_ext.system.errors import InputError, did_you_mean, is_out_of_memory, one_line

# What another command calls an option.
ALIASES = {"--text": "--calibration"}


def _call(place: str, options: argparse.Namespace) -> int:
    """Call a function of a module of commands, which imports torch, and return an exit code."""
    module, function = place.split(":")
    code = getattr(import_module(f"liar_ext.cli.{module}"), function)(options)
    return code if isinstance(code, int) else 0


PLACES = {  # module and function
    **{name: f"{name}:run" for name in ("prune", "calibrate", "resume", "sweep", "heal")},
    **{name: f"info:run_{name}" for name in ("compare", "doctor", "export", "families", "report")},
    "bench": "evaluate:run_bench",
    "compare-methods": "sweep:run_compare_methods",
    "eval": "evaluate:run",
    "merge": "calibrate:run_merge",
    "verify": "evaluate:run_verify",
}
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    name: partial(_call, place) for name, place in PLACES.items()
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
    if not (sys.argv[1:] if arguments is None else arguments):
        top.print_help(sys.stderr)
        top.error("no command was given; name one of those above")
    options, rest = top.parse_known_args(arguments)
    try:
        os.getcwd()  # without which torch can't be imported
    except OSError:
        top.error("the current folder was removed; change to one that exists")
    takes = ("prune", "calibrate", "sweep", "compare-methods")
    lacks = options.command in takes and not hasattr(options, "model")
    if lacks and len(rest) == 1 and not rest[0].startswith("-"):
        options.model, rest = rest[0], []
    if rest:
        known = top.of_command[options.command]
        given = rest[0].partition("=")[0]
        hint = did_you_mean(ALIASES.get(given, given), known._option_string_actions)
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
    with open(os.devnull, "w") as nowhere:  # the first rank alone says what all would say alike
        with redirect_stderr(nowhere) if is_other() else nullcontext():
            options = parse(arguments)
    wanted = getattr(options, "progress", None)  # None: a command that takes no time
    options.quiet, options.json = (getattr(options, name, False) for name in ("quiet", "json"))
    options.progress = wanted in ("auto", "plain") and not options.quiet
    # What follows imports torch; the version, the help and typos are answered without it.
    from liar_ext.checkpoint.loading import register
    from liar_ext.cli.output import quietened
    from liar_ext.system.distributed import tells
    from liar_ext.system.progress import no_bars, plain_lines, showing_bars

    register()
    plain = wanted == "plain" or not sys.stderr.isatty()
    try:
        with quietened(options):
            bars = showing_bars(options.progress)
            others = no_bars() if wanted and (plain or not options.progress) else nullcontext()
            with shown(options.progress, options.quiet), plain_lines(plain), others, bars:
                code, error = _run(options)
    except BaseException:
        tells()  # so that the others don't
        raise
    if error is not None and tells():
        print(error_lines(error, options), file=sys.stderr, flush=True)
    return code


def _run(options: argparse.Namespace) -> tuple[int, object]:
    """Run the command; return its exit code, and what to say of it."""
    from liar_ext.cli.output import interrupted, meet
    from liar_ext.system.distributed import leave

    with _interrupts() as interrupts:
        try:
            meet(options)
            code = COMMANDS[options.command](options) or 0
            _finish_output(options.command)
            leave()
            return code, None
        except BaseException as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                return 130, interrupted(options)
            return _answer(error, options)


def _answer(error: BaseException, options: argparse.Namespace) -> tuple[int, object]:
    """Return the exit code of an error, and what to say of it; raise one that is a defect."""
    from liar_ext.cli.output import how_to_go_on
    from liar_ext.system.distributed import RankLost

    if isinstance(error, BrokenPipeError):
        return (141, None) if _nobody_reads() else (2, error)
    if isinstance(error, (InputError, OSError)):  # OSError: no permission, disk full, no such file
        return 2, error
    if isinstance(error, RankLost):
        return 3, how_to_go_on(error, options)
    if is_out_of_memory(error):
        said = str(error) or "out of memory"
        return 2, (
            f"{said.split('. ')[0]}; give smaller --batch-size or --memory, --dtype bfloat16, "
            "--device auto for several GPUs, or --max-memory to prune block by block"
        )
    raise error


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect the interrupts that come; what is interrupted may raise another error instead."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    background = threading.current_thread() is not threading.main_thread()
    if background or before is not signal.default_int_handler:
        yield seen
        return

    def interrupt(number: int, _: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _open_streams() -> None:
    """Let standard streams that are closed lead nowhere, before a file gets their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
        elif number:  # a terminal that can't show a name shows a "?"
            with suppress(AttributeError):
                getattr(sys, name).reconfigure(errors="replace")


def _finish_output(command: str) -> None:
    """Write what is left of the output; where it can't be, say that the job is done."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise InputError(
            f"{command}: the job is done, and what it says can't be printed: {one_line(error)}"
        ) from error


def _drop_output() -> None:
    """Let what is left of the output go nowhere: Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Tell whether the standard output is closed at its other end; what is left goes nowhere."""
    end = select.poll()
    end.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in end.poll(0))
    if closed:
        _drop_output()
    return closed
