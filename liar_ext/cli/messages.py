"""What the commands say: errors with their hints, and what trackers of experiments get."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.recipe.fields import option_of, recipe_fields
from liar_ext.system.environment import launched
from liar_ext.system.errors import did_you_mean, one_line, printable

if TYPE_CHECKING:
    from liar_ext.report.report import Report


COLOURS = {"error": "1;31", "warning": "1;33", "hint": "1;36"}
OPERATION = re.compile(r"^(?:[A-Za-z]\w*\.?)+: ")  # the function that raised, or the command
ARGUMENT = re.compile(r"argument ([^\s:]+): ")  # as argparse begins
# of="flops" or tile=32, as Python has it.
KEYWORD = re.compile(r"""(?<![\w./-])([a-z_]+)=(["']?)([\w.-]+)\2(?![\w/]|\.\w)""")
PATHS = (  # options that name something to read
    *("model", "calibration", "eval", "text", "recipe", "bank", "banks", "latency_table"),
    *("folder", "folders", "against"),
)
FIELD = re.compile(r"^(?:recipe|Budget): (\w+)(?= )")  # of a recipe, where an error begins
OPTIONS = {each.name: option_of(each) for each in recipe_fields() if each.name != "model"}
# A field such as keep_blocks in a line, and no part of a path.
NAMED = re.compile(rf"(?<![\w./-])({'|'.join(n for n in OPTIONS if '_' in n)})(?![\w/=-])")


def error_lines(message: object, options: argparse.Namespace | None = None) -> str:
    """Return ``error:`` with what is wrong and, where there is one, ``hint:`` with what to type.

    An error of the package reads ``operation: what is wrong; what to do``. Fields of a recipe
    become options. For a file or folder of the options that isn't there, a near name is shown.
    """
    line = _as_options(" ".join(str(message).split()))
    line = FIELD.sub(lambda found: f"recipe: {OPTIONS.get(found[1], found[1])}", line)
    line = ARGUMENT.sub(r"\1 ", OPERATION.sub("", line))
    cause, _, hint = line.partition("; ")
    hint = " ".join(filter(None, [*_near_paths(options, cause), hint]))
    lines = [("error", cause)] + ([("hint", hint)] if hint else [])
    return "\n".join(f"{_painted(word)} {one_line(said)}" for word, said in lines)


def is_other() -> bool:
    """Tell whether torchrun started this process as another rank than the first."""
    return launched() and os.environ["RANK"] != "0"


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
                line = _as_options(printable(" ".join(str(message).split())))
                said = OPERATION.sub("", line, count=1)
                print(_painted("warning"), said, file=sys.stderr, flush=True)

            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _as_options(line: str) -> str:
    """Return a line with ``of="flops"``, ``tile=32`` and ``keep_blocks`` spelled as options."""
    line = KEYWORD.sub(
        lambda found: f"{OPTIONS[found[1]]} {found[3]}" if found[1] in OPTIONS else found[0], line
    )
    return NAMED.sub(lambda found: OPTIONS[found[1]], line)


def _near_paths(options: argparse.Namespace | None, cause: str) -> Iterator[str]:
    """Yield a near name for the first path of the options that an error names and that isn't."""
    words = [word.strip("'\",:") for word in cause.split()]

    def named(text: str) -> bool:
        return any(word == text or word.endswith(f"/{text}") for word in words)

    for value in (getattr(options, name, None) for name in PATHS):
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and named(text) and not os.path.lexists(text):
                path, near = Path(text), ""
                with suppress(OSError):  # no such folder, or none that can be read
                    near = did_you_mean(path.name, os.listdir(path.parent))
                if near:
                    yield near.replace("mean ", f"mean {path.parent}/") if "/" in text else near
                    return


def _painted(word: str) -> str:
    """Return a word with its colon, in colour where stderr is a terminal that has some."""
    plain = (
        not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    )
    return f"{word}:" if plain else f"\033[{COLOURS[word]}m{word}:\033[0m"


TRACKERS = ("mlflow", "wandb")


def read_tracker(name: str) -> str:
    """Read the name of a tracker; one that isn't installed is refused before the job begins."""
    if name in TRACKERS and find_spec(name) is None:
        raise argparse.ArgumentTypeError(f"{name} is not installed; run pip install {name}")
    return name


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
