"""``liar prune``, and :func:`liar_ext.compress`, which does what it does."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext

from typing_extensions import Unpack

from liar_ext.calibration.moments import MomentBank
from liar_ext.checkpoint.quietening import no_bars
from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
from liar_ext.checkpoint_store import RESULT, Checkpoint
from liar_ext.cli.dry_run import describe, run_by_blocks
from liar_ext.cli.fields import read_size
from liar_ext.cli.inputs import SKETCHED, Given, TextAndOwn, add_facts, let_write, load
from liar_ext.cli.options import recipe_of
from liar_ext.cli.output import print_estimate, say
from liar_ext.cli.resume import check_apart, checkpoint_of
from liar_ext.cli.with_bank import load_by_bank
from liar_ext.distributed import alone, is_first
from liar_ext.errors import InputError
from liar_ext.job import prune
from liar_ext.job.choosing import sequences_to_judge
from liar_ext.job.pruning import check_resumable
from liar_ext.progress import OnProgress, told
from liar_ext.recipe import Recipe
from liar_ext.recipe.checks import CompressOptions, check_keywords
from liar_ext.report.report import Report


def run(options: argparse.Namespace) -> None:
    """Run the job that the options and their recipe say."""
    recipe = recipe_of(options)
    _check_complete(recipe, options)
    run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> Report | None:
    """Run the job that a recipe says, and for its output the options; None for a dry run."""
    start, bank = time.perf_counter(), None
    sketch = getattr(options, "dry_run", False)
    if options.out:
        check_folder(options.out, options.overwrite)
    if options.checkpoint:
        check_resumable(recipe)
    check_apart(options)
    if options.max_memory is not None:
        return run_by_blocks(recipe, options, start)
    if options.bank:
        # As it was asked for; the bank says more.
        given, bank, settled = load_by_bank(options.bank, recipe, options)
    else:
        asked = {"sketch": sketch, "judge": sequences_to_judge(recipe)}
        given, settled = load(recipe, progress=options.progress, **asked), recipe
    if sketch and is_first():
        with alone():
            print_estimate(_sketched(given, settled, options.progress), options)
    if sketch:
        return None
    loaded = time.perf_counter() - start
    with checkpoint_of(recipe, options) as saved:
        report = prune_given(given, settled, bank, saved, progress=options.progress)
        if not is_first():
            return report
        # Those of saving are added by save_pruned, which writes the report.
        report.seconds = {"load": loaded, **report.seconds, "save": 0.0}
        report.seconds["total"] = time.perf_counter() - start
        if saved is not None:
            saved.put(RESULT, facts={"plan": report.plan.to_json()})
        with writing(options.out, options.overwrite, checked=True) as path:
            saving = {"report": report, "tokenizer": given.tokenizer, "start": time.perf_counter()}
            fill_folder(given.model, path, report.plan, **saving)
    say(report, options, start)
    return report


def _sketched(given: Given, recipe: Recipe, progress: bool) -> list[str]:
    """Return the lines of a dry run."""
    let_write(given, recipe, sketch=True, progress=progress)
    lines = describe(given.model, given.calibration, recipe, given.judging)
    seconds = given.facts.get("writing", 0.0)
    if isinstance(given.calibration, TextAndOwn):
        seconds = given.calibration.seconds * max(recipe.seq_len / SKETCHED, 1.0)
    if seconds:
        lines.append(f"text of its own: about {seconds:.0f} seconds to write")
    return lines


def prune_given(
    given: Given,
    recipe: Recipe,
    bank: MomentBank | None = None,
    saved: Checkpoint | None = None,
    *,
    progress: bool,
) -> Report:
    """Prune what was loaded; the report says what became of the texts, too."""
    if bank is None:
        let_write(given, recipe, saved, progress=progress)
    report = prune(
        given.model,
        given.calibration,
        recipe,
        evaluate_on=given.evaluation,
        certify_on=given.certification,
        judge_on=given.judging,
        bank=bank,
        checkpoint=saved,
        progress=progress,
    )
    if isinstance(given.calibration, TextAndOwn):
        report.seconds = {"write": given.calibration.seconds, **report.seconds}
    add_facts(report, given)
    return report


def _check_complete(recipe: Recipe, options: argparse.Namespace) -> None:
    """Refuse a job that lacks one of the three that have no default."""
    if getattr(options, "recipe", None) and not recipe.calibration and not options.bank:
        raise InputError(
            f"prune: {options.recipe} names no text, as its job ran in Python, or with a bank; "
            "give --calibration TEXT"
        )
    missing = {
        "MODEL": not recipe.model,
        "--calibration TEXT": not recipe.calibration and not options.bank,
        "--out DIR": not options.out and not options.dry_run,
    }
    names = [name for name, lacks in missing.items() if lacks]
    if options.bank and options.dry_run:
        raise InputError(
            "prune: --dry-run tells what a calibration would take, which --bank spares; leave one "
            "out, or let liar sweep show what budgets give"
        )
    if names:
        raise InputError(
            f"prune: liar prune needs {', '.join(names)}; a first run is liar prune MODEL "
            "--calibration text.txt --out pruned, MODEL before --calibration"
        )


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
