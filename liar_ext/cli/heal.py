"""``liar heal``: train a pruned folder for a short while towards its dense model."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from liar_ext.calibration.batches import Batch, Batches, count_tokens, read_batches
from liar_ext.checkpoint import load_pruned
from liar_ext.checkpoint.carrying import kept_tokens
from liar_ext.checkpoint.folder import EXPORTS_FILE, PLAN_FILE, REPORT_JSON
from liar_ext.checkpoint.loading import placement, read_plan
from liar_ext.checkpoint.placing import check_folder
from liar_ext.checkpoint.readers import load_tokenizer
from liar_ext.checkpoint.saving import fill_folder, writing
from liar_ext.cli.inputs import Given, let_write, load, load_with_tokenizer
from liar_ext.cli.main import parse, show
from liar_ext.cli.options import given_fields
from liar_ext.cli.resume import check_apart, checkpoint_of
from liar_ext.healing.heal import heal
from liar_ext.healing.training import Teacher, mean_loss
from liar_ext.job.vocabulary import SAME_VOCABULARY
from liar_ext.measure.embeddings import Evaluator
from liar_ext.models.plan import Plan
from liar_ext.models.recipe import Recipe
from liar_ext.models.running import inputs_read
from liar_ext.report.reading import read_report
from liar_ext.report.report import Report
from liar_ext.report.sections import HEALED_BEFORE, healing_lines
from liar_ext.report.tables import measured
from liar_ext.system.checkpoint_store import RESULT
from liar_ext.system.distributed import broadcast, is_first, world_size
from liar_ext.system.errors import InputError
from liar_ext.vocabulary.keep import SAMPLES, keep_tokens

LEAST_SAMPLES, MOST_SAMPLES, IN_MINUTES = 16, 1 << 16, 1 << 12
BATCH_TOKENS = 512  # for the same tokens many small steps gain more than few large ones
TEACHER = "name the model that was pruned with --teacher"
TRAINED = 7  # sequences for each that is held out: an eighth of the documents is held out
SHORT = re.compile(r" gave \d+ of \d+ (sequences|files)")  # in a note of the draw
MEASURED = 16  # held-out sequences, at most
OUTDATED = "Files that liar export made of {} have the weights before healing: repeat it."


def run(options: argparse.Namespace) -> int:
    """Run the job that the options and the report of the folder say."""
    options.out = options.out or options.folder
    return run_recipe(_recipe(options), options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> int:
    """Train the folder and print what came out; return 130 if training was interrupted."""
    found = train(recipe, options)
    lines = [] if options.quiet else [*healing_lines(found), f"{options.out}: saved"]
    show(options, {"out": options.out, **found}, lines, found["notes"] if options.json else None)
    return 130 if found["interrupted"] else 0


def train_pruned(folder: str, minutes: float, checkpoint: str | None) -> Report:
    """Train a folder in place, as ``liar heal FOLDER --minutes N`` does; return its report.

    The first rank writes the folder, before and in here, and the others wait for it.
    """
    broadcast(None)
    options = parse(["heal", "FOLDER", "--minutes", str(minutes)])
    options.folder, options.out, options.checkpoint = folder, folder, checkpoint
    train(_recipe(options), options)
    broadcast(None)
    return Report.load(folder, "heal")


def train(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Load both models and the text, train, save; return the section ``heal`` of the report."""
    report = Report.load(options.folder, "heal")
    plan = read_plan(Path(options.folder, PLAN_FILE), "heal")
    in_place = os.path.realpath(options.out) == os.path.realpath(options.folder)
    check_folder(options.out, in_place or options.overwrite)
    check_apart(options)
    with checkpoint_of(recipe, options) as saved:
        given = load(
            recipe,
            loader=partial(_load_teacher, Path(options.folder)),
            judge=max(recipe.samples // TRAINED, 2),
            must_judge=True,
        )
        spread = placement(recipe.device)
        model = load_pruned(options.folder, dtype="auto", **spread)
        model = model if spread else model.to(recipe.device)
        _check_teacher(given, model, options.folder)
        quality = partial(_quality, Evaluator(), given.evaluation)
        rows = [quality(given.model), quality(model)]
        let_write(given, saved)
        batches = list(small(given.calibration))
        found = heal(
            model,
            given.model,
            batches,
            held_out=given.judging[:: -(-len(given.judging) * recipe.batch_size // MEASURED)],
            budget=_budget(options),
            lr=options.lr,
            train=options.train,
            accumulate=options.grad_accumulation,
            seed=recipe.seed,
            checkpoint=saved,
        )
        rows.append(quality(model) if found["improved"] else rows[-1])
        names = [name for name in rows[0] if name in rows[1]]
        found["quality"] = {name: [row[name] for row in rows] for name in names}
        found |= {"teacher": recipe.model, "text": list(recipe.calibration)}
        found["self_text"] = recipe.self_text
        # How often the text was read stands for how many sequences it gave.
        found["notes"] = [note for note in given.notes if not SHORT.search(note)]
        times = round(found["tokens"] / sum(map(count_tokens, batches)))
        if times > 1:
            (unit,) = _budget(options)
            found["notes"].append(
                f"The text is read {times} times: give more text or fewer {unit}."
            )
        found["notes"] += _on_folder(report.heal, found, options.folder, in_place)
        report.heal = found
        if saved is not None:
            saved.put(RESULT, facts={"plan": plan.to_json()})
        if is_first():
            _write(model, plan, report, options, in_place)
    return found


def _write(
    model: nn.Module, plan: Plan, report: Report, options: argparse.Namespace, in_place: bool
) -> None:
    """Write the healed folder; its report has the JSON of the pruned one, but for the healing."""

    def save(folder: Path) -> None:
        facts = read_report(options.folder, "heal")
        report.save(folder)
        text = json.dumps(facts | {"heal": report.to_dict()["heal"]}, indent=1)
        (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")

    # Without seconds: those of the report stay those of pruning.
    written = SimpleNamespace(save=save, to_card=report.to_card, warnings=report.warnings)
    with writing(options.out, in_place or options.overwrite) as path:
        fill_folder(model, path, plan, report=written, source=options.folder)


def _on_folder(
    earlier: Mapping[str, Any], found: Mapping[str, Any], folder: str, in_place: bool
) -> list[str]:
    """Return notes on the folder: its vocabulary, earlier healing, and what is outdated now."""
    fewer = kept_tokens(Path(folder), "heal") is not None
    same = [SAME_VOCABULARY] * (fewer and bool(found["quality"]))  # of both models
    before = [line for line in earlier.get("notes", ()) if line.startswith(HEALED_BEFORE)]
    before += [f"{HEALED_BEFORE}{line}" for line in healing_lines(earlier)[:1]]
    outdated = in_place and found["improved"] and Path(folder, EXPORTS_FILE).is_file()
    return [*same, *before, *[OUTDATED.format(folder)] * outdated]


def _load_teacher(folder: Path, name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """Return the dense model and its tokenizer, with the tokens that the pruned folder has."""
    if os.path.realpath(name) == os.path.realpath(folder):
        raise InputError(f"heal: {name} is the folder to train, and no dense model; {TEACHER}")
    try:
        model, tokenizer = load_with_tokenizer(name, dtype, device)
    except InputError as error:
        raise InputError(f"{error}; {TEACHER}") from error
    kept = kept_tokens(folder, "heal")
    if kept is not None:
        known = _inner(tokenizer).get_vocab()
        try:
            own = _inner(load_tokenizer(folder, model))
            if own.get_vocab() != known:
                # By name: their numbers are those of the last model, which had lost some before.
                names = own.convert_ids_to_tokens(range(len(kept)))
                tokenizer = keep_tokens(model, tokenizer, [known[name] for name in names])
        except (InputError, KeyError, IndexError) as error:
            raise InputError(f"heal: {name} lacks tokens of {folder}; {TEACHER}") from error
    return model, tokenizer


def _check_teacher(given: Given, model: nn.Module, folder: str) -> None:
    """Refuse a dense model that reads text otherwise, or has other inputs or outputs."""
    own, other = (_inner(each) for each in (load_tokenizer(folder, model), given.tokenizer))
    both = own is not None and other is not None
    if both and any(own.encode(text) != other.encode(text) for text in SAMPLES):
        raise InputError(
            f"heal: {given.recipe.model} reads text as other tokens than {folder}; {TEACHER}"
        )
    if inputs_read(model).keys() != inputs_read(given.model).keys():
        raise InputError(f"heal: {given.recipe.model} has other inputs than {folder}; {TEACHER}")
    mean_loss(model, Teacher(given.model), [next(small(given.judging)).select([0])])


def _inner(tokenizer: Any) -> Any:
    return getattr(tokenizer, "tokenizer", tokenizer)  # of a processor


def small(batches: Batches) -> Iterator[Batch]:
    """Yield batches cut into parts of some 512 tokens, of one sequence at least."""
    for batch in read_batches(batches):
        parts = min(max(math.ceil(count_tokens(batch) / BATCH_TOKENS), 1), len(batch))
        yield from map(batch.select, torch.arange(len(batch)).tensor_split(parts))


def _recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe by which teacher and text are loaded: the folder's, with the options."""
    start = Report.load(options.folder, "heal").recipe
    start = start if isinstance(start, Recipe) else Recipe()
    start = replace(start, random_tokens=0.0, self_text=0.0, certify=0, latency_table=None)
    start = replace(start, keep_vocab=1.0, vocab_text=(), vocab_scripts=())  # the folder says it
    recipe = Recipe.build(start, dtype="float32", **given_fields(options))
    recipe = replace(recipe, model=options.teacher or recipe.model)
    names = [] if recipe.model else ["the dense model (--teacher MODEL)"]
    names += [] if recipe.calibration else ["text to train on (--calibration TEXT)"]
    if names:
        raise InputError(
            f"heal: the report of {options.folder} does not name {' and '.join(names)}; add the "
            "option"
        )
    (unit, amount), *_ = _budget(options).items()
    each = recipe.batch_size * options.grad_accumulation * world_size()
    wanted = {"tokens": amount / recipe.seq_len, "steps": amount * each, "minutes": IN_MINUTES}
    samples = min(max(int(wanted[unit]) + 1, LEAST_SAMPLES), MOST_SAMPLES)
    return replace(recipe, samples=samples)


def _budget(options: argparse.Namespace) -> dict[str, float]:
    found = {name: getattr(options, name) for name in ("tokens", "minutes", "steps")}
    return {name: value for name, value in found.items() if value is not None}


def _quality(evaluator: Evaluator, held_out: Any, model: Any) -> dict[str, float]:
    return {} if held_out is None else measured(evaluator(model, held_out))
