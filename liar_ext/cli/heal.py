"""``liar heal``: train a pruned folder for a short while towards its dense model."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from liar_ext.checkpoint.names import PLAN_FILE, REPORT_JSON
from liar_ext.checkpoint_store import JOB, SUFFIX, names_in, remove
from liar_ext.cli.fields import add_field, at_least, read_name, read_number
from liar_ext.errors import InputError
from liar_ext.healing.weights import TRAIN
from liar_ext.plan import Plan
from liar_ext.recipe import Recipe
from liar_ext.recipe.checks import shown
from liar_ext.recipe.fields import recipe_fields
from liar_ext.untrusted import read_object

# Fields of the recipe that are options here, too, as the recipe of the folder has them by default.
FIELDS = ("calibration", "self_text", "eval", "seq_len", "batch_size", "seed", "device")
LEAST_SAMPLES, MOST_SAMPLES, IN_MINUTES = 16, 1 << 16, 1 << 12
TRAINED = 7  # sequences for each that is held out: an eighth of the documents is held out
MEASURED = 16  # held-out sequences, at most


def run(options: argparse.Namespace) -> int:
    """Load both models and the text, train, save; return 130 if training was interrupted."""
    from liar_ext.checkpoint.loading import load_pruned, placement
    from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
    from liar_ext.cli.prune import load
    from liar_ext.cli.resume import check_apart
    from liar_ext.healing.heal import heal
    from liar_ext.report.report import Report

    in_place = options.out is None or os.path.realpath(options.out) == os.path.realpath(
        options.folder
    )
    options.out = options.folder if in_place else options.out
    report = Report.load(options.folder, "heal")
    plan = Plan.load(Path(options.folder, PLAN_FILE))
    overwrite = in_place or options.overwrite
    check_folder(options.out, overwrite)
    check_apart(options)
    _check_checkpoint(options.checkpoint)
    recipe, budget = _recipe(report.recipe, options), _budget(options)
    judge = max(recipe.samples // TRAINED, 2)
    given = load(recipe, progress=not options.quiet, judge=judge)
    if given.judging is None:
        raise InputError(
            "heal: the text is too short to hold out an eighth of its documents; give more text, "
            "or a smaller --seq-len"
        )
    spread = placement(recipe.device)
    model = load_pruned(options.folder, dtype="auto", **spread)
    model = model if spread else model.to(recipe.device)
    before = _perplexity(model, given, options)
    found = heal(
        model,
        given.model,
        _with_own(given, recipe, options),
        held_out=given.judging[:: -(-len(given.judging) * recipe.batch_size // MEASURED)],
        budget=budget,
        lr=options.lr,
        train=options.train,
        accumulate=options.grad_accumulation,
        seed=recipe.seed,
        checkpoint=options.checkpoint,
        progress=not options.quiet,
    )
    after = _perplexity(model, given, options) if found["improved"] else before
    found |= {"perplexity": [*before, *after], "teacher": recipe.model}
    found |= {"text": list(recipe.calibration), "self_text": recipe.self_text}
    found["notes"] = [*given.notes, *_earlier(report.heal)]
    report.heal = found
    save = partial(_save, report, options.folder)
    # Without seconds: those of the report stay those of pruning.
    written = SimpleNamespace(save=save, to_card=report.to_card, warnings=report.warnings)
    with writing(options.out, overwrite, checked=True) as path:
        facts = {"report": written, "source": options.folder, "start": time.perf_counter()}
        fill_folder(model, path, plan, **facts)
    if options.checkpoint:
        remove(options.checkpoint)
    if not options.quiet:
        from liar_ext.report.healing import sentences

        print("\n".join([*sentences(found), f"{options.out}: saved"]))
    return 130 if found["interrupted"] else 0


def _save(report: Any, pruned: str, folder: Path) -> None:
    """Write a report; its JSON stays as it is in the pruned folder, but for the healing."""
    facts, _ = read_object(Path(pruned, REPORT_JSON), "heal")
    report.save(folder)
    text = json.dumps(facts | {"heal": report.to_dict()["heal"]}, indent=1)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")


def _recipe(start: Any, options: argparse.Namespace) -> Recipe:
    """Return the recipe by which teacher and text are loaded: the folder's, with the options."""
    start = start if isinstance(start, Recipe) else Recipe()
    start = replace(start, random_tokens=0.0, self_text=0.0, certify=0, latency_table=None)
    given = {name: getattr(options, name) for name in FIELDS if hasattr(options, name)}
    recipe = Recipe.build(start, dtype="float32", **given)
    recipe = replace(recipe, model=options.teacher or recipe.model)
    missing = {
        "the dense model (--teacher MODEL)": recipe.model,
        "text to train on (--calibration TEXT)": recipe.calibration,
    }
    names = [name for name, value in missing.items() if not value]
    if names:
        raise InputError(
            f"heal: the report of {options.folder} does not name {' and '.join(names)}; add the "
            "option"
        )
    (unit, amount), *_ = _budget(options).items()
    each = recipe.batch_size * options.grad_accumulation
    wanted = {"tokens": amount / recipe.seq_len, "steps": amount * each, "minutes": IN_MINUTES}
    samples = min(max(int(wanted[unit]) + 1, LEAST_SAMPLES), MOST_SAMPLES)
    return replace(recipe, samples=samples)


def _budget(options: argparse.Namespace) -> dict[str, float]:
    found = {name: getattr(options, name) for name in ("tokens", "minutes", "steps")}
    return {name: value for name, value in found.items() if value is not None}


def _with_own(given: Any, recipe: Recipe, options: argparse.Namespace) -> list:
    """Return the batches to train on, with those that the dense model writes."""
    from liar_ext.cli.own_text import let_write

    let_write(given, recipe, progress=not options.quiet)
    return list(given.calibration)


def _perplexity(model: Any, given: Any, options: argparse.Namespace) -> list[float]:
    """Return the perplexity on the evaluation text, if there is one."""
    from liar_ext.evaluation import perplexity

    if given.evaluation is None:
        return []
    return [perplexity(model, given.evaluation, progress=not options.quiet)["perplexity"]]


def _earlier(found: Any) -> list[str]:
    """Return what an earlier healing of the folder did."""
    from liar_ext.report.healing import sentences

    return [f"Healed before: {line}" for line in sentences(found)[:1]]


def _check_checkpoint(folder: str | None) -> None:
    """Refuse a folder that holds something else."""
    others = names_in(folder) if folder else set()
    if others and f"{JOB}{SUFFIX}" not in others:
        raise InputError(
            f"checkpoint: {folder} must be a new or empty folder, or a checkpoint, and holds "
            f"{', '.join(sorted(others)[:3])}; name another folder"
        )


def add_heal(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "heal",
        help="train a pruned folder for a short while towards its dense model",
        usage="liar heal DIR (--tokens N | --minutes N | --steps N) [options]",
        description="Distil the dense model into the pruned folder DIR: train on the calibration "
        "text, without labels, and keep the state that is best on held-out text. Optional: pruning "
        "needs no training. DIR is replaced, unless --out is given.",
        epilog="Example: liar heal gpt2-half --tokens 100k --out gpt2-half-healed",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", type=read_name, help="folder written by liar prune")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=_count, metavar="N", help="train on N tokens, as 100k, 2M")
    budget.add_argument("--minutes", type=_above_zero, metavar="N", help="train for N minutes")
    budget.add_argument("--steps", type=at_least(1), metavar="N", help="train for N steps")
    add(
        "--train",
        choices=TRAIN,
        default="no-embeddings",
        help="weights to train (default: %(default)s)",
    )
    add("--lr", type=_above_zero, default=1e-4, help="highest learning rate (default: %(default)s)")
    add(
        "--grad-accumulation",
        type=at_least(1),
        default=1,
        metavar="N",
        help="batches per step (default: %(default)s)",
    )
    text = parser.add_argument_group("Models and text (default: those of the pruning job)")
    text.add_argument("--teacher", type=read_name, metavar="MODEL", help="the dense model")
    for each in recipe_fields():
        if each.name in FIELDS:
            add_field(text, each)
    for action in text._group_actions:
        action.help = re.sub(r" \(default: [^)]*\)$", "", action.help)
    output = parser.add_argument_group("Output")
    output.add_argument("--out", type=read_name, metavar="OUT", help="write OUT, and keep DIR")
    output.add_argument(
        "--checkpoint",
        type=read_name,
        metavar="DIR",
        help="save progress in DIR; resume with the same command",
    )
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    output.add_argument("--quiet", action="store_true", help="no progress bars, no summary")


def _count(text: str) -> int:
    """Read a count such as 20000, 100k or 2M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    value = float(found[1]) * {"": 1, "k": 1000, "M": 1_000_000}[found[2]] if found else 0
    if not 1 <= value < 2**53:
        raise argparse.ArgumentTypeError(
            f"must be a number of at least 1, such as 20000, 100k or 2M, got {shown(text)}"
        )
    return int(value)


def _above_zero(text: str) -> float:
    value = read_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {shown(text)}")
    return value
