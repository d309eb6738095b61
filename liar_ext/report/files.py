"""Write pages, pictures and measurements: whole or not at all, and over nobody else's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError, one_line
from liar_ext.whole_file import whole_file


def check_place(path: Path, operation: str, option: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a place where a file can't be written, or that holds anything but one of ours.

    Parameters
    ----------
    path : Path
        Where it goes.
    operation, option : str
        The command, and its option that names another place.
    is_ours : callable
        Tells whether a file that is there may be replaced.

    Raises
    ------
    InputError
        If so.
    """
    other = f"give another name with {option}"
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{operation}: {path} is no ordinary file; {other}")
        if path.exists() and not is_ours(path):
            raise InputError(
                f"{operation}: {path} exists and liar {operation} didn't write it; remove it, or "
                f"{other}"
            )
        if not path.parent.is_dir():
            raise InputError(
                f"{operation}: there is no folder {path.parent} to write into; make it, or {other}"
            )
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{operation}: {path.parent} may not be written to; {other}")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{operation}: can't write {path}: {one_line(error)}; {other}") from error


def begins_with(mark: str) -> Callable[[Path], bool]:
    """Return what tells whether a file begins with a mark."""

    def is_ours(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(mark.encode())) == mark.encode()

    return is_ours


def write_whole(path: Path, data: str, operation: str, option: str) -> None:
    """Write a text file by :func:`liar_ext.whole_file.whole_file`.

    Raises
    ------
    InputError
        If it can't be written.
    """
    try:
        with whole_file(path) as file:
            file.write(data.encode())
    except OSError as error:
        raise InputError(
            f"{operation}: can't write {path}: {one_line(error)}; give another name with {option}"
        ) from error


def write_pictures(folder: Path, figures: Mapping[str, Any], operation: str) -> list[Path]:
    """Write figures as PNG files of their names into a folder, which is made; return the files.

    Raises
    ------
    InputError
        If they can't be written, or a file there is not one of these.
    """
    from liar_ext.report.canvas import is_png, to_png

    pictures = {folder / f"{name}.png": figure for name, figure in figures.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in pictures:
            check_place(path, operation, "--png", is_png)
        for path, figure in pictures.items():
            with whole_file(path) as file:
                to_png(figure, file)
    except OSError as error:
        raise InputError(
            f"{operation}: can't write into {folder}: {one_line(error)}; give another with --png"
        ) from error
    return list(pictures)
