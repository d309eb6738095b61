"""``liar prune``, and :func:`liar_ext.compress`, which does what it does."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn
from typing_extensions import Unpack

from liar_ext.calibration.generated import SELF
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.placing import check_folder, nearest_folder, warn_of_little_room
from liar_ext.cli import inputs
from liar_ext.cli import options as kinds
from liar_ext.cli.calibrate import load_by_bank
from liar_ext.cli.heal import train_pruned
from liar_ext.cli.main import say, show
from liar_ext.cli.options import StrPath, check_complete, paths_of, recipe_of
from liar_ext.cli.resume import check_apart, check_untrained, checkpoint_of
from liar_ext.healing import MINUTES
from liar_ext.job.planning import describe, describe_streamed
from liar_ext.job.pruning import check_resumable, prune_folder
from liar_ext.job.solving import sequences_to_judge
from liar_ext.job.state import Job
from liar_ext.models import recipe_checks as check
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_checks import CompressOptions, check_keywords
from liar_ext.report.report import Report
from liar_ext.report.sections import vocabulary_lines
from liar_ext.system.distributed import alone, is_first
from liar_ext.system.errors import InputError, naming_memory, one_line
from liar_ext.system.progress import OnProgress, no_bars, showing_bars

NONE_WRITTEN = (
    "The model wrote no calibration text of its own (--self-text), for which all of it must be in "
    "memory: text unlike that of the calibration set loses more."
)


def run(options: argparse.Namespace) -> int:
    """Check that the options and their recipe say a whole job, and run it."""
    recipe = recipe_of(options)
    if options.bank and options.dry_run:
        raise InputError(
            "prune: --dry-run tells what a calibration would take, which --bank spares; leave one "
            "out, or let liar sweep show what budgets give"
        )
    given = {"MODEL": recipe.model, "--calibration TEXT": recipe.calibration or options.bank}
    given["--out DIR"] = options.out or options.dry_run
    example = "a first run is liar prune MODEL --calibration text.txt --out pruned"
    check_complete("prune", given, example)
    return run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> int:
    """Do as :func:`prune_by`; return 130 if training was interrupted."""
    report = prune_by(recipe, options)
    return 130 if report is not None and report.heal.get("interrupted") else 0


def prune_by(recipe: Recipe, options: argparse.Namespace) -> Report | None:
    """Run the job that a recipe says, and for its output the options; None for a dry run."""
    start = time.perf_counter()
    if options.checkpoint:
        check_untrained(options.checkpoint)
        check_resumable(recipe)
    if options.out:
        check_folder(options.out, options.overwrite)
    check_apart(options)
    asked = options.heal is not None
    _settle_healing(recipe.model, options)
    if getattr(options, "dry_run", False):
        lines = _sketched(_loaded(recipe, options, sketch=True), options)
        lines += [f"training: {options.heal:g} min"] * bool(options.heal)
        if is_first():
            show(options, {"dry_run": lines}, lines)
        return None
    report, early = _pruned(recipe, options, start)
    if options.heal:
        try:
            with naming_memory("heal: out of memory"):
                report = train_pruned(options.out, options.heal, options.checkpoint)
        except (InputError, MemoryError) as error:
            if asked:
                raise InputError(f"{error}; {options.out} is pruned and saved") from error
            report.warnings.append(f"The preset did not train the result: {one_line(error)}")
    if is_first():
        say(report, options, start, early)
    return report


def _pruned(
    recipe: Recipe, options: argparse.Namespace, start: float
) -> tuple[Report, Sequence[str]]:
    """Load, prune and save; return the report, and those of its warnings that were given before.

    Nothing of the model is left in memory, in which training reads the dense one again.
    """
    with checkpoint_of(recipe, options) as saved:
        given = _loaded(recipe, options)
        loaded = time.perf_counter() - start

        def annotate(report: Report) -> None:
            before = {"load": loaded}
            if isinstance(given.calibration, inputs.TextAndOwn):
                before["write"] = given.calibration.seconds
            # Those of saving are added where the report is written.
            report.seconds = {**before, **report.seconds, "save": 0.0}
            report.seconds["total"] = time.perf_counter() - start
            given.add_to(report, given.model)

        with naming_memory("prune: out of memory"):
            # What the text lacks is said while there is time to stop.
            early = given.notes if is_first() and not options.json else ()
            for note in early:
                warnings.warn(note, stacklevel=2)
            if is_first():
                warn_of_little_room(options.out, given.model)
            inputs.let_write(given, saved)
            job = Job(
                given.model,
                given.calibration,
                given.recipe,
                given.bank,
                saved=saved,
                judged=given.judging,
                evaluate_on=given.evaluation,
                certify_on=given.certification,
                limit=options.max_memory or 0,
            )
            how = {"tokenizer": given.tokenizer, "overwrite": options.overwrite}
            return prune_folder(given.store, job, options.out, **how, annotate=annotate), early


def _settle_healing(model: str, options: argparse.Namespace) -> None:
    """Settle how long the result is trained; refuse it where that needs what the job spares."""
    why = "--max-memory prunes a model that memory has no room for" if options.max_memory else ""
    if options.out and os.path.realpath(options.out) == os.path.realpath(model):
        why = "--out replaces the dense one that it learns from"
    why = "--bank brings no text for it to read" if options.bank else why
    if options.heal is None:
        options.heal = MINUTES.get(getattr(options, "preset", ""), 0.0)
        if options.heal and why:
            warnings.warn(f"prune: the preset does not train the result, as {why}", stacklevel=2)
            options.heal = 0.0
    elif not 0 <= options.heal < 1e18:  # as --minutes of liar heal
        raise InputError(f"prune: heal must be a number of minutes, got {options.heal}")
    elif options.heal and why:
        raise InputError(
            f"prune: --heal trains the whole model, and {why}; leave one out, or change it"
        )


def _loaded(recipe: Recipe, options: argparse.Namespace, sketch: bool = False) -> inputs.Given:
    if options.max_memory is not None:
        return load_blocks(recipe, options)
    if options.bank:
        return load_by_bank(recipe, options)
    return inputs.load(recipe, sketch=sketch, judge=sequences_to_judge(recipe))


def _sketched(given: inputs.Given, options: argparse.Namespace) -> list[str]:
    """Return lines on what a command would do with what it has loaded, at the first rank."""
    if given.store is not None:
        known = {"certify_on": given.certification, "limit": options.max_memory}
        job = Job(given.model, given.calibration, given.recipe, **known)
        return describe_streamed(job, given.store)
    if not is_first():
        return []
    with alone():
        inputs.let_write(given, sketch=True)
        lines = describe(given.model, given.calibration, given.recipe, given.judging)
    lines += [f"vocabulary: {said}" for said in vocabulary_lines(given.vocabulary.facts)]
    seconds = given.facts.get("writing", 0.0)
    if isinstance(given.calibration, inputs.TextAndOwn):
        seconds = given.calibration.seconds * max(given.recipe.seq_len / inputs.SKETCHED, 1.0)
    if seconds:
        lines.append(f"text of its own: about {seconds:.0f} s to write")
    return lines


def load_blocks(recipe: Recipe, options: argparse.Namespace) -> inputs.Given:
    """Return what a recipe names, with a model that stays in its files."""
    if SELF in recipe.calibration or recipe.keep_vocab != 1.0 or options.bank:
        raise InputError(
            "prune: --calibration self, --keep-vocab and --bank need all of the model or its "
            "statistics in memory; leave them or --max-memory out"
        )
    stores = []

    def open_store(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
        room = nearest_folder(options.out) if options.out else None
        stores.append(BlockStore(name, dtype, device, room=room))
        inputs.check_tokenizer(name, stores[0].tokenizer)
        return stores[0].model, stores[0].tokenizer

    read = replace(recipe, self_text=0.0)
    given = inputs.load(read, loader=open_store)
    (given.store,) = stores
    if inputs.writes(recipe, given.model):
        given.warnings.append(NONE_WRITTEN)
    given.warnings = [each.replace(inputs.OWN_SHARE, "") for each in given.warnings]
    return given


OWN = ("text", "out", "recipe", "bank", "checkpoint", "progress")


def compress(
    model: StrPath,
    text: StrPath | Sequence[StrPath] | None = None,
    *,
    out: StrPath,
    recipe: Recipe | StrPath | None = None,
    bank: StrPath | None = None,
    checkpoint: StrPath | None = None,
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
        Folder for progress. After an interruption, resume with the same call,
        and training with ``liar resume``.
    progress : bool or callable
        As for :func:`liar_ext.prune`.
    **options
        Fields of the recipe, ``preset`` and ``sites``.

    Returns
    -------
    Report
        As saved in the folder.

    Other Parameters
    ----------------
    heal : str or float, optional
        A time such as ``"5m"``, or minutes: train the result for so long towards the dense model,
        in place, as ``liar heal`` does. 0 by default, and 5 with ``preset="best"``, where training
        is possible: not with ``max_memory`` or ``bank``.
    max_memory : int or str, optional
        Bytes, or a size such as ``"12GiB"``: prune block by block, in at most so much memory.
    overwrite : bool
        Replace a pruned model in ``out``.

    Raises
    ------
    InputError
        If a file, the model or an option cannot be used.
    """
    known = [*CompressOptions.__annotations__, *OWN]
    check_keywords("compress", options, known, {"calibration": "give it as text"})
    if not isinstance(model, str | os.PathLike):
        kind = type(model).__name__
        raise InputError(
            f"compress: model must be a folder, a hub id or a GGUF file, got a {kind}; "
            "liar_ext.prune takes a loaded model"
        )
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise InputError(f"compress: out must be a folder to write, got {out!r}")
    max_memory, overwrite = options.pop("max_memory", None), options.pop("overwrite", False)
    minutes = options.pop("heal", None)
    given = dict(options, model=os.fspath(model))
    if text is not None:
        given["calibration"] = paths_of(text)
    start = Recipe.load(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    built = Recipe.build(start, **given)
    if not built.calibration and bank is None:
        raise InputError('compress: needs text or a bank; a first call has text="text.jsonl"')
    places = {"out": out, "bank": bank, "checkpoint": checkpoint}
    command = argparse.Namespace(
        **{name: getattr(built, name) for name in given if name in vars(built)},
        **{name: each if each is None else os.fspath(each) for name, each in places.items()},
        command="prune",
        preset=options.get("preset"),
        max_memory=None if max_memory is None else check.size("max_memory", max_memory),
        heal=_minutes(minutes),
        overwrite=overwrite,
        quiet=True,
        json=False,
    )
    with showing_bars(progress), nullcontext() if progress is True else no_bars():
        report = prune_by(built, command)
    for note in report.warnings if is_first() else ():
        warnings.warn(note, stacklevel=2)
    return report


def _minutes(value: Any) -> float | None:
    """Read a time as the command does; a number, and None, stay as they are."""
    try:
        value = kinds.read_minutes(value) if isinstance(value, str) else value
    except argparse.ArgumentTypeError as error:
        raise InputError(f"compress: heal {error}") from None
    if value is not None and not check.is_number(value):
        raise InputError(f"compress: heal must be a number of minutes, or 5m, got {value!r}")
    return value
