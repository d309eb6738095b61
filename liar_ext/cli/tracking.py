"""``liar prune --log mlflow|wandb``: the numbers of a report, in a tracker of experiments."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from liar_ext.errors import one_line

if TYPE_CHECKING:
    from liar_ext.report.report import Report

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
