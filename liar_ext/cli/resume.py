"""``liar resume``: go on with a job that was stopped, by what its checkpoint holds.

Beside what is done a checkpoint has ``job.json``: the command, its recipe and its other options,
and the folder that it was started in, where the names in it mean what they meant. It doesn't say
what may be overwritten, which is asked for each time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from liar_ext.calibration.bank_file import read_bank
from liar_ext.calibration.saved_sums import SUFFIX as BANK
from liar_ext.calibration.saved_sums import SUMS
from liar_ext.checkpoint.manifest import strangers
from liar_ext.checkpoint.names import PLAN_FILE
from liar_ext.cli.own_text import WRITTEN
from liar_ext.errors import InputError, one_line
from liar_ext.pipeline.resuming import RESULT
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.recipe.checks import check_printable
from liar_ext.saved.progress import LOCK_FILE, STAMP, SUFFIX, Progress, facts_of
from liar_ext.whole_file import is_unfinished, whole_file

JOB_FILE, VERSION = "job.json", 3
MOST_BYTES = 1 << 20
NOTHING_DONE = f"{STAMP}{SUFFIX}", f"{WRITTEN}{SUFFIX}"  # files that are there before any step
# Options of the commands that are no fields of a recipe, and their types.
OWN: dict[str, dict[str, tuple[type, ...]]] = {
    "calibrate": {"bank": (str,), "no_text": (bool,), "sensitivities": (bool,)},
    "prune": {"bank": (str, type(None)), "out": (str,), "max_memory": (int, type(None))},
}


def run(options: argparse.Namespace, start: Mapping[str, Callable]) -> None:
    """Read the job, say what there is of it, go on by what starts its command."""
    ranks = options.ranks
    job = ranks.broadcast(read_job(options.folder) if ranks.first else None)
    folder, command = os.path.abspath(options.folder), job["command"]
    result = job["options"]["bank" if command == "calibrate" else "out"]
    if not (options.quiet or options.json):
        found = "; ".join(what_is_saved(folder)) or "before anything was saved"
        print(
            f"{options.folder}: liar {command}, {result}, stopped with {found}; going on in "
            f"{job['folder']}",
            flush=True,
        )
    try:
        os.chdir(job["folder"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"resume: can't go to {job['folder']!r}, where the job was started: {one_line(error)}"
        ) from error
    done = is_calibrated if command == "calibrate" else is_pruned
    if ranks.broadcast(done(folder, result) if ranks.first else None):
        if ranks.first:
            remove(folder)
        if options.json:
            print(json.dumps({"out": result, "written_before": True}))
        elif not options.quiet:
            print(f"{result}: was written already")
        return
    own = {"checkpoint": folder, "command": command, "ranks": ranks}
    own |= {name: getattr(options, name) for name in ("quiet", "json", "progress", "overwrite")}
    start[command](Recipe.from_dict(job["recipe"]), argparse.Namespace(**job["options"], **own))


def what_is_saved(folder: str | os.PathLike[str]) -> list[str]:
    """Return in words what a checkpoint holds, in the order in which it was saved."""
    said = []
    with suppress(OSError):
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime_ns):
            if path.suffix == BANK and path.name.startswith(SUMS):
                source = read_bank(path, sums=False).source
                of = f" of {source['batches']}" if "batches" in source else ""
                group = path.stem.removeprefix(SUMS).removeprefix("-")
                group = f" of group {group}" if group else ""
                said.append(f"sums over {source.get('progress', 0)}{of} batches{group}")
            elif path.suffix == SUFFIX:
                said += [(facts_of(path) or {}).get("said")]
    return [each for each in said if isinstance(each, str)]


def is_calibrated(folder: str, bank: str) -> bool:
    """Tell whether a bank is of all the text that the sums of a checkpoint are over."""
    path = Path(folder, f"{SUMS}{BANK}")
    if not (path.exists() and os.path.exists(bank)):
        return False
    try:
        found = read_bank(bank, sums=False).source
    except InputError:
        return False
    sums = read_bank(path, sums=False).source
    return all(found.get(name) == sums.get(name) for name in ("model", "dtype", "data"))


def is_pruned(folder: str, out: str) -> bool:
    """Tell whether a folder is the result of a checkpoint's job: whole, later, and of its plan."""
    try:
        written, began = (Path(*parts).stat() for parts in ((out, PLAN_FILE), (folder, JOB_FILE)))
        if not Path(folder, f"{RESULT}{SUFFIX}").exists() or strangers(Path(out)):
            return False
        with Progress(folder) as progress:
            plan = progress.need(RESULT).facts["plan"]
        later = written.st_mtime_ns >= began.st_mtime_ns
        return later and Plan.load(Path(out, PLAN_FILE)) == Plan.from_json(plan)
    except OSError:
        return False


def check_apart(options: argparse.Namespace) -> None:
    """Refuse a checkpoint that lies in a result, or that a file of the job lies in.

    Raises
    ------
    InputError
        If so.
    """
    if not options.checkpoint:
        return
    folder = os.path.realpath(options.checkpoint)
    for name in ("out", "bank"):
        path = getattr(options, name, None)
        if path and os.path.commonpath([folder, os.path.realpath(path)]) in (
            folder,
            os.path.realpath(path),
        ):
            raise InputError(
                f"checkpoint: --checkpoint {options.checkpoint} and --{name} {path} must not lie "
                "one in the other, as the checkpoint is removed in the end; name another folder"
            )


@contextmanager
def checkpoint_of(recipe: Recipe, options: argparse.Namespace) -> Iterator[Progress | None]:
    """Open the checkpoint of a job, if there is to be one.

    It is removed when the job is done, and where the job is refused before anything was saved. Of
    several ranks the first one alone does that.
    """
    folder, first = options.checkpoint, options.ranks.first
    if not folder:
        yield None
        return
    new = first and not Path(folder, JOB_FILE).exists()
    if first:
        begin(folder, recipe, options)
    with Progress(folder, ranks=options.ranks) as progress:
        try:
            yield progress
        except InputError:
            if new and _names(folder) <= {JOB_FILE, LOCK_FILE, *NOTHING_DONE}:
                remove(folder)
            raise
        if first:
            remove(folder)


def begin(folder: str, recipe: Recipe, options: argparse.Namespace) -> None:
    """Write the job into a checkpoint, or raise InputError if it has another one."""
    path = Path(folder, JOB_FILE)
    own = {name: getattr(options, name) for name in OWN[options.command]}
    job = {"version": VERSION, "command": options.command, "folder": os.getcwd()}
    job |= {"recipe": recipe.to_dict(), "options": own}
    if path.exists():
        before = read_job(folder)
        if before["command"] != options.command:
            raise InputError(
                f"checkpoint: {folder} is of a job of liar {before['command']}, got "
                f"{options.command}; name another folder"
            )
        for part in ("recipe", "options"):
            for name, value in job[part].items():
                if before[part].get(name) != value:
                    raise InputError(
                        f"checkpoint: {folder} is of a job with {name} {before[part].get(name)}, "
                        f"got {value}; liar resume {folder} goes on with that one, or name "
                        "another folder"
                    )
        return
    others = _names(folder) - {LOCK_FILE}
    if others:
        raise InputError(
            f"checkpoint: {folder} must be a new or empty folder, or a checkpoint, and holds "
            f"{', '.join(sorted(others)[:3])}; name another folder"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(job, indent=1).encode())
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint: can't write into {folder!r}: {one_line(error)}; name another folder"
        ) from error


def read_job(folder: str) -> dict[str, Any]:
    """Return the job of a checkpoint.

    Raises
    ------
    InputError
        If there is none, or it is no job of this version.
    """
    path = Path(folder, JOB_FILE)
    try:
        if not path.is_file():
            raise InputError(
                f"resume: {folder} has no {JOB_FILE}; give the DIR of --checkpoint DIR, which is "
                "removed when its job is done"
            )
        with path.open("rb") as file:
            job = json.loads(file.read(MOST_BYTES))
        _check(job)
        recipe = Recipe.from_dict(job["recipe"])
        if not recipe.model:
            raise ValueError("it names no model")
        job["recipe"] = recipe.to_dict()
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError) and str(error).startswith("resume: "):
            raise
        raise InputError(
            f"resume: {path} is no job of this version: {one_line(error)}; start it again in a "
            "new folder"
        ) from None
    return job


def remove(folder: str) -> None:
    """Remove a checkpoint whose job is done, and its folder if nothing else is in it.

    By what goes last a job that is done is known for that, if a kill comes in between.
    """
    own = {path for path in Path(folder).iterdir() if _is_own(path)}
    job, lock, *last = (
        Path(folder, name) for name in (JOB_FILE, LOCK_FILE, f"{SUMS}{BANK}", f"{RESULT}{SUFFIX}")
    )
    for path in [*own.difference(last), job, *own.intersection(last), lock]:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        os.rmdir(folder)


def _is_own(path: Path) -> bool:
    """Tell whether a job wrote a file of a checkpoint, by what the file says of itself."""
    if path.suffix == BANK and path.name.startswith(SUMS):
        with suppress(InputError):
            return "progress" in read_bank(path, sums=False).source
    return is_unfinished(path.name) or (path.suffix == SUFFIX and facts_of(path) is not None)


def _check(job: Any) -> None:
    if not isinstance(job, Mapping) or job.get("version") != VERSION:
        raise ValueError(f"version must be {VERSION}")
    own, known = job.get("options"), OWN.get(str(job.get("command")))
    if known is None or not isinstance(job.get("folder"), str):
        raise ValueError(f"command must be {' or '.join(OWN)}, folder a name")
    if not isinstance(own, Mapping) or own.keys() != known.keys():
        raise ValueError(f"options must be {', '.join(known)}")
    for name, kinds in known.items():
        if type(own[name]) not in kinds:
            raise ValueError(f"{name} must be of type {kinds[0].__name__}")
    for name, value in {"folder": job["folder"], **own}.items():
        if isinstance(value, str):
            check_printable(name, value)


def _names(folder: str) -> set[str]:
    """Return what is in a folder, but for what a killed writer has left."""
    try:
        return {name for name in os.listdir(folder) if not is_unfinished(name)}
    except (OSError, ValueError):
        return set()
