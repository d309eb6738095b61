"""What ``liar prune`` does, as one call in Python."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext

from typing_extensions import Unpack

from liar_ext.bars import OnProgress, told
from liar_ext.checkpoint.quietening import no_bars
from liar_ext.cli.fields import read_size
from liar_ext.cli.prune import run_recipe
from liar_ext.errors import InputError
from liar_ext.recipe import Recipe
from liar_ext.recipe.keywords import CompressOptions, check_keywords
from liar_ext.report.report import Report

Path = str | os.PathLike[str]
OWN = ("text", "out", "recipe", "bank", "checkpoint", "max_memory", "overwrite", "progress")
INSTEAD = {
    "calibration": "give it as text",
    "dry_run": "liar prune --dry-run prints the plan",
    "quiet": "nothing is printed; progress=True shows bars",
}


def compress(
    model: Path,
    text: Path | Sequence[Path] | None = None,
    *,
    out: Path,
    recipe: Recipe | Path | None = None,
    bank: Path | None = None,
    checkpoint: Path | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    progress: bool | OnProgress = False,
    **options: Unpack[CompressOptions],
) -> Report:
    """Load a model, prune it, save it with its report: ``liar prune`` as one call.

    Every option of the command is a keyword, with its default there::

        report = compress("gpt2", text="text.jsonl", keep=0.5, out="gpt2-half")
        print(report.summary())

    Parameters
    ----------
    model : str or path
        Model folder, hub id, or GGUF file.
    text : str or path, or a sequence of them
        Calibration text: ``--calibration`` of the command. Not with ``bank``, and not needed if
        ``recipe`` names it.
    out : str or path
        Folder to write.
    recipe : Recipe or path, optional
        Settings of an earlier run, or its ``liar/recipe.yaml``.
    bank : str or path, optional
        File of ``liar calibrate``.
    checkpoint : str or path, optional
        Folder for progress. After an interruption, resume with the same call.
    max_memory : int or str, optional
        Bytes, or a size such as ``"12GiB"``: prune block by block, in at most so much memory.
    overwrite : bool
        Replace a pruned model in ``out``.
    progress : bool or callable
        As for :func:`liar_ext.prune`.
    **options
        Fields of the recipe, ``preset`` and ``sites``.

    Returns
    -------
    Report
        As saved in the folder.

    Raises
    ------
    InputError
        If a file, the model or an option cannot be used.
    """
    check_keywords("compress", options, [*CompressOptions.__annotations__, *OWN], INSTEAD)
    if not isinstance(model, str | os.PathLike):
        kind = type(model).__name__
        raise InputError(
            f"compress: model must be a folder, a hub id or a GGUF file, got a {kind}; "
            "liar_ext.prune takes a loaded model"
        )
    given = dict(options, model=os.fspath(model))
    if text is not None:
        texts = [text] if isinstance(text, str | os.PathLike) else text
        given["calibration"] = tuple(os.fspath(each) for each in texts)
    start = Recipe.load(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    built = Recipe.build(start, **given)
    if not built.calibration and bank is None:
        raise InputError('compress: needs text or a bank; a first call has text="text.jsonl"')
    command = argparse.Namespace(
        **{name: getattr(built, name) for name in given if hasattr(built, name)},
        command="prune",
        out=os.fspath(out),
        bank=None if bank is None else os.fspath(bank),
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        max_memory=_bytes(max_memory),
        overwrite=overwrite,
        progress=bool(progress),
        quiet=True,
        json=False,
    )
    with told(progress), nullcontext() if progress is True else no_bars():
        return run_recipe(built, command)


def _bytes(size: int | str | None) -> int | None:
    """Return a size in bytes."""
    try:
        return read_size(size) if isinstance(size, str) else size
    except argparse.ArgumentTypeError as error:
        raise InputError(f"compress: max_memory {error}") from None
