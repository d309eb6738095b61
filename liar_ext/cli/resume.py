"""``liar resume``: go on with a job that was stopped, by what its checkpoint holds.

Beside the sums a checkpoint has ``job.json``: the command, its recipe and its other options, and
the folder that it was started in, where the names in it mean what they meant.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from liar_ext.calibration.bank_file import read_bank
from liar_ext.calibration.saved_sums import saved_batches
from liar_ext.saved.progress import LOCK_FILE
BANK_FILE="calibration.bank"
from liar_ext.errors import InputError, one_line
from liar_ext.recipe import Recipe
from liar_ext.whole_file import whole_file

JOB_FILE, VERSION = "job.json", 1
MOST_BYTES = 1 << 20
# Options of liar calibrate that are no fields of a recipe, and their types.
OWN = {"bank": str, "no_text": bool, "sensitivities": bool, "overwrite": bool}


def run(options: argparse.Namespace) -> None:
    """Read the job, say what there is of it, go on."""
    from liar_ext.cli import calibrate

    job = read_job(options.folder)
    folder = os.path.abspath(options.folder)
    if not options.quiet:
        batches = saved_batches(folder)
        print(
            f"{options.folder}: liar calibrate --bank {job['options']['bank']}, stopped after "
            f"{batches} batches; going on in {job['folder']}"
        )
    given = {name: value for name, value in job["recipe"].items() if name != "version"}
    try:
        os.chdir(job["folder"])
    except OSError as error:
        raise InputError(
            f"resume: can't go to {job['folder']!r}, where the job was started: {one_line(error)}"
        ) from error
    if _is_done(folder, job["options"]["bank"]):
        remove(folder)
        if not options.quiet:
            print(f"{job['options']['bank']}: was written already")
        return
    own = {"checkpoint": folder, "quiet": options.quiet, "command": "calibrate"}
    calibrate.run(argparse.Namespace(**given, **job["options"], **own))


def _is_done(folder: str, bank: str) -> bool:
    """Tell whether a bank is of all the text that the sums of a checkpoint are over."""
    path = Path(folder, BANK_FILE)
    if not (path.exists() and os.path.exists(bank)):
        return False
    try:
        found = read_bank(bank, sums=False).source
    except InputError:
        return False
    sums = read_bank(path, sums=False).source
    return all(found.get(name) == sums.get(name) for name in ("model", "dtype", "data"))


def begin(folder: str, recipe: Recipe, options: argparse.Namespace) -> None:
    """Write the job into a checkpoint, or raise InputError if it has another one."""
    path = Path(folder, JOB_FILE)
    own = {name: getattr(options, name) for name in OWN}
    job = {"version": VERSION, "command": "calibrate", "folder": os.getcwd()}
    job |= {"recipe": recipe.to_dict(), "options": own}
    if path.exists():
        before = read_job(folder)
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
                f"resume: {folder} has no {JOB_FILE}; give the DIR of liar calibrate --checkpoint "
                "DIR, which is removed when its job is done"
            )
        with path.open("rb") as file:
            job = json.loads(file.read(MOST_BYTES))
        _check(job)
        job["recipe"] = Recipe.from_dict(job["recipe"]).to_dict()
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError) and str(error).startswith("resume: "):
            raise
        raise InputError(
            f"resume: {path} is no job of this version: {one_line(error)}; start it again in a "
            "new folder"
        ) from None
    return job


def remove(folder: str) -> None:
    """Remove a checkpoint whose job is done, and its folder if nothing else is in it."""
    for name in (BANK_FILE, JOB_FILE, LOCK_FILE):
        Path(folder, name).unlink(missing_ok=True)
    with suppress(OSError):
        os.rmdir(folder)


def _check(job: Any) -> None:
    if not isinstance(job, Mapping) or job.get("version") != VERSION:
        raise ValueError(f"version must be {VERSION}")
    own = job.get("options")
    if job.get("command") != "calibrate" or not isinstance(job.get("folder"), str):
        raise ValueError("command must be calibrate, folder a name")
    if not isinstance(own, Mapping) or own.keys() != OWN.keys():
        raise ValueError(f"options must be {', '.join(OWN)}")
    for name, kind in OWN.items():
        if type(own[name]) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}")


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):
        return set()
