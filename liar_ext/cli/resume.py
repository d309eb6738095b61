"""``liar resume``: continue an interrupted job from its checkpoint.

The checkpoint has the command, its recipe and other options, and the folder in which it was
started, to which file names are relative. It can't allow overwriting: that is asked for each time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from liar_ext.calibration.bank import MomentBank
from liar_ext.checkpoint.folder import PLAN_FILE, strangers
from liar_ext.cli.inputs import WRITTEN
from liar_ext.cli.main import check_shared, show
from liar_ext.models.plan import Plan
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_checks import text
from liar_ext.system import checkpoint_store as store
from liar_ext.system.checkpoint_store import JOB_FILE
from liar_ext.system.distributed import broadcast, is_first
from liar_ext.system.errors import InputError, printable, refusing, typed

NOTHING_DONE = {JOB_FILE, f"{WRITTEN}{store.SUFFIX}"}  # files that are there before any step
TEXT, NONE = (str,), type(None)
NUMBER = (int, float, NONE)
# Options of the commands that are no fields of a recipe, and their types.
OWN: dict[str, dict[str, tuple[type, ...]]] = {
    "calibrate": {"out": TEXT, "no_text": (bool,), "sensitivities": (bool,)},
    "prune": {"bank": (str, NONE), "out": TEXT, "max_memory": (int, NONE), "heal": NUMBER},
    "heal": {
        **dict.fromkeys(("folder", "out", "train"), TEXT),
        **{"lr": (float, NONE), "grad_accumulation": (int,)},
        **dict.fromkeys(("tokens", "minutes", "steps"), NUMBER),
    },
}


def run(options: argparse.Namespace) -> object:
    """Read the job, print its progress, continue by the module of its command."""
    job = broadcast(read_job(options.folder) if is_first() else None)
    folder, command = os.path.abspath(options.folder), job["command"]
    options.checkpoint = folder
    check_shared(command)
    result = job["options"]["out"]
    if not (options.quiet or options.json):
        found = "; ".join(what_is_saved(folder)) or "before anything was saved"
        line = f"{options.folder}: liar {command}, {result}, stopped with {found}; going on in "
        print(printable(line + job["folder"]), flush=True)
    gone = f"resume: can't go to {job['folder']!r}, where the job was started"
    with refusing(gone, "", OSError, ValueError):
        os.chdir(job["folder"])
    if broadcast(is_done(folder, result) if is_first() else None):
        if is_first():
            store.remove(folder)
        lines = [] if options.quiet else [f"{result}: was written already"]
        if minutes := job["options"].get("heal"):
            again = f"liar heal {typed(result)} --minutes {minutes:g}"
            lines.append(f"{result}: not trained yet: {again}")
        return show(options, {"out": result, "written_before": True}, lines)
    own = {"checkpoint": folder, "command": command, **job["options"]}
    own |= {name: getattr(options, name) for name in ("quiet", "json", "overwrite")}
    start = import_module(f"liar_ext.cli.{command}").run_recipe  # it imports this module
    return start(Recipe.from_dict(job["recipe"]), argparse.Namespace(**own))


def check_untrained(checkpoint: str) -> None:
    """Refuse to prune anew what was pruned, and whose training has begun and was stopped."""
    if (store.facts_of(checkpoint, store.JOB) or {}).get("command") == "heal":
        again = f"liar resume {typed(checkpoint)}"
        raise InputError(f"prune: {checkpoint} has a model in training; {again} goes on with it")


def what_is_saved(folder: str | os.PathLike[str]) -> list[str]:
    """Return in words what a checkpoint holds, in the order in which it was saved."""
    said = [store.facts_of(folder, key).get("said") for key in store.keys_in(folder)]
    return [each for each in said if isinstance(each, str)]


def is_done(folder: str, result: str) -> bool:
    """Tell whether a bank or folder is the result that a checkpoint has recorded."""
    facts, place = store.facts_of(folder, store.RESULT), Path(result)
    try:
        if facts is None or not place.exists():
            return False
        if "plan" not in facts:
            found = MomentBank.load(place, sums=False).source
            return all(found.get(name) == value for name, value in facts.items())
        written, began = (path.stat() for path in (place / PLAN_FILE, Path(folder, JOB_FILE)))
        later = written.st_mtime_ns >= began.st_mtime_ns and not strangers(place)
        return later and Plan.load(place / PLAN_FILE) == Plan.from_json(facts["plan"])
    except (OSError, TypeError, InputError):
        return False


def check_apart(options: argparse.Namespace) -> None:
    """Refuse a checkpoint inside a result, or a file of the job inside a checkpoint."""
    if not options.checkpoint:
        return
    folder = os.path.realpath(options.checkpoint)
    for name in ("out", "bank"):
        path = getattr(options, name, None)
        both = [folder, os.path.realpath(path)] if path else []
        if path and os.path.commonpath(both) in both:
            raise InputError(
                f"checkpoint: --checkpoint {options.checkpoint} and --{name} {path} must not lie "
                "one in the other, as the checkpoint is removed in the end; name another folder"
            )
    if is_first():
        store.is_new(folder)  # refused before anything is loaded


@contextmanager
def checkpoint_of(recipe: Recipe, options: argparse.Namespace) -> Iterator[store.Checkpoint | None]:
    """Open the checkpoint of a job, if there is to be one.

    Before a model is read, since only one process may work there. The first rank removes it when
    the job is done, or is refused before anything was saved.
    """
    folder, first = options.checkpoint, is_first()
    if not folder:
        yield None
        return
    new = first and store.is_new(folder)
    with store.Checkpoint(folder) as saved:
        try:
            own = {name: getattr(options, name) for name in OWN[options.command]}
            job = {"command": options.command, "options": own, "recipe": recipe.to_dict()}
            saved.begin(job, folder=os.getcwd())
            yield saved
        except (InputError, OSError):
            if new and store.names_in(folder) <= NOTHING_DONE:
                store.remove(folder)
            raise
        if first:
            store.remove(folder)


def read_job(folder: str) -> dict[str, Any]:
    """Return the job of a checkpoint; raise InputError if it has none of this version."""
    path = Path(folder, JOB_FILE)
    what, hint = f"resume: {path} is no job of this version", "start it again in a new folder"
    own = ("resume: ", "checkpoint: ")
    with refusing(what, hint, OSError, ValueError, KeyError, own=own):
        if not path.exists():
            raise InputError(
                f"resume: {folder} has no {JOB_FILE}; give the DIR of --checkpoint DIR, which is "
                "removed when its job is done"
            )
        job = store.facts_of(folder, store.JOB)
        _check(job)
        recipe = Recipe.from_dict(job["recipe"])
        if not recipe.model:
            raise ValueError("it names no model")
        return job | {"recipe": recipe.to_dict()}


def _check(job: Any) -> None:
    if not isinstance(job, Mapping) or job.get("version") != store.VERSION:
        raise ValueError(f"version must be {store.VERSION}")
    own, known = job.get("options"), OWN.get(str(job.get("command")))
    if known is None or not isinstance(job.get("folder"), str):
        raise ValueError(f"command must be one of {', '.join(OWN)}, folder a name")
    if not isinstance(own, Mapping) or own.keys() != known.keys():
        raise ValueError(f"options must be {', '.join(known)}")
    for name, kinds in known.items():
        if type(own[name]) not in kinds:
            raise ValueError(f"{name} must be of type {kinds[0].__name__}")
    for name, value in {"folder": job["folder"], **own}.items():
        if isinstance(value, str):
            text(name, value)
