"""``liar prune``: load, draw text, prune, save."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.self_calibration import SELF
from liar_ext.checkpoint_store import RESULT, Checkpoint
from liar_ext.cli.loading import load_with_tokenizer
from liar_ext.cli.options import recipe_of
from liar_ext.cli.own_text import SKETCHED, TextAndOwn, let_write, writes
from liar_ext.cli.processes import check_device
from liar_ext.data.random_tokens import fraction_of
from liar_ext.distributed import alone, broadcast, is_first
from liar_ext.errors import InputError
from liar_ext.models.inputs import known_tokens
from liar_ext.models.running import predicts_next_token
from liar_ext.recipe import Recipe
from liar_ext.report.report import Report

ONE_KIND = (
    "The calibration set is of one kind of text, and text unlike it loses more than it shows: name "
    "another kind as well, or let the model write a share of its own with --self-text 0.25."
)

UNMEASURED = (
    "The text is too short to measure --schedule auto on: layers are solved layer by layer, or in "
    "one pass if a norm reads the output of each layer."
)


def run(options: argparse.Namespace) -> None:
    """Run the job that the options and their recipe say."""
    recipe = recipe_of(options)
    _check_complete(recipe, options)
    run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> None:
    """Run the job that a recipe says, and for its output the options."""
    start, bank = time.perf_counter(), None

    from liar_ext.checkpoint.saving import check_folder, fill_folder, writing
    from liar_ext.cli.resume import check_apart, checkpoint_of
    from liar_ext.pipeline.pipeline import check_resumable

    sketch = getattr(options, "dry_run", False)
    if options.out:
        check_folder(options.out, options.overwrite)
    if options.checkpoint:
        check_resumable(recipe)
    check_apart(options)
    if options.max_memory is not None:
        from liar_ext.cli.by_blocks import run_by_blocks

        run_by_blocks(recipe, options, start)
        return
    if options.bank:
        from liar_ext.cli.with_bank import load_by_bank

        # As it was asked for; the bank says more.
        given, bank, settled = load_by_bank(options.bank, recipe, options)
    else:
        from liar_ext.pipeline.choosing import sequences_to_judge

        asked = {"sketch": sketch, "judge": sequences_to_judge(recipe)}
        given, settled = load(recipe, progress=not options.quiet, **asked), recipe
    if sketch and is_first():
        with alone():
            print("\n".join(_sketched(given, settled, not options.quiet)))
    if sketch:
        return
    loaded = time.perf_counter() - start
    with checkpoint_of(recipe, options) as saved:
        report = prune_given(given, settled, bank, saved, progress=not options.quiet)
        if not is_first():
            return
        # Those of saving are added by save_pruned, which writes the report.
        report.seconds = {"load": loaded, **report.seconds, "save": 0.0}
        report.seconds["total"] = time.perf_counter() - start
        if saved is not None:
            saved.put(RESULT, facts={"plan": report.plan.to_json()})
        with writing(options.out, options.overwrite, checked=True) as path:
            saving = {"report": report, "tokenizer": given.tokenizer, "start": time.perf_counter()}
            fill_folder(given.model, path, report.plan, **saving)
    say(report, options, start)


def _sketched(given: Given, recipe: Recipe, progress: bool) -> list[str]:
    """Return the lines of a dry run."""
    from liar_ext.cli.dry_run import describe

    let_write(given, recipe, sketch=True, progress=progress)
    lines = describe(given.model, given.calibration, recipe, given.judging)
    seconds = given.facts.get("writing", 0.0)
    if isinstance(given.calibration, TextAndOwn):
        seconds = given.calibration.seconds * max(recipe.seq_len / SKETCHED, 1.0)
    if seconds:
        lines.append(f"text of its own: about {seconds:.0f} seconds to write")
    return lines


def say(report: Report, options: argparse.Namespace, start: float) -> None:
    """Print what came out."""
    if not options.quiet:
        print(report.summary())
        print(f"{options.out}: saved after {time.perf_counter() - start:.0f} s")


def prune_given(
    given: Given,
    recipe: Recipe,
    bank: MomentBank | None = None,
    saved: Checkpoint | None = None,
    *,
    progress: bool,
) -> Report:
    """Prune what was loaded; the report says what became of the texts, too."""
    from liar_ext.pipeline import prune

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


def add_facts(report: Report, given: Given) -> None:
    """Let a report say what became of the texts."""
    report.settings |= given.facts
    report.warnings += given.warnings


@dataclass
class Given:
    """What a recipe names, loaded."""

    model: nn.Module
    tokenizer: Any
    calibration: Sequence[Mapping[str, Tensor]] | None  # None: that of the bank
    evaluation: Sequence[Mapping[str, Tensor]] | None
    certification: Sequence[Mapping[str, Tensor]] | None
    judging: Sequence[Mapping[str, Tensor]] | None
    facts: dict[str, object]
    warnings: list[str]
    notes: tuple[str, ...] = ()  # of the draw
    documents: Tensor | None = None  # their digests, where they are asked for


def load(
    recipe: Recipe,
    *,
    progress: bool = False,
    digests: bool = False,
    loader: Callable[[str, str, str], tuple[nn.Module, Any]] = load_with_tokenizer,
    sketch: bool = False,
    judge: int = 0,
) -> Given:
    """Return the model, by a loader of it and its tokenizer, and the batches of a recipe.

    With ``digests`` also those of its documents. Of several ranks each loads the model; the first
    one reads, writes and draws text, and hands the others the sequences. A ``sketch`` has as many
    sequences, but of what the model writes itself only beginnings, again and again, and what all of
    it would take, in seconds, as ``facts["writing"]``. With ``judge`` so many sequences more are
    drawn to judge whole models by, if the text has them.

    Raises
    ------
    InputError
        If one of them can't be read, or they don't go together.
    """
    from liar_ext.data import texts

    check_device(recipe.device)
    check_unloaded(recipe)
    read, held_out = _documents(recipe) if is_first() else ({}, None)
    model, tokenizer = loader(recipe.model, recipe.dtype, recipe.device)
    texts.check_seq_len(model, recipe.seq_len)
    drawn = None
    if is_first():
        settings = {"digests": digests, "progress": progress, "sketch": sketch, "judge": judge}
        drawn = _draw(recipe, model, tokenizer, read, held_out, **settings)
    return Given(model, tokenizer, *broadcast(drawn))


def _documents(recipe: Recipe) -> tuple[dict[str, Sequence[str]], Sequence[str] | None]:
    """Return the documents of a recipe by source, and those to evaluate on."""
    from liar_ext.data import texts

    read = {source: texts.read_documents(source) for source in recipe.calibration if source != SELF}
    held_out = texts.read_documents(recipe.eval) if recipe.eval else None
    if held_out is not None:
        texts.check_apart([text for documents in read.values() for text in documents], held_out)
    return read, held_out


def _draw(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    read: dict[str, Sequence[str]],
    held_out: Sequence[str] | None,
    *,
    digests: bool,
    progress: bool,
    sketch: bool,
    judge: int,
) -> tuple:
    """Return what :class:`Given` has beside the model and its tokenizer, in its order."""
    from liar_ext.data import texts
    from liar_ext.data.documents import document_digests
    from liar_ext.pipeline.choosing import LEAST

    facts: dict[str, object] = {"calibration": list(recipe.calibration), "seq_len": recipe.seq_len}
    if SELF in recipe.calibration:
        asked = {"judge": judge, "progress": progress, "sketch": sketch}
        read[SELF], seconds = _written(model, tokenizer, recipe, **asked)
        facts |= {"writing": seconds} if sketch else {}
    written = SELF in recipe.calibration or writes(recipe, model)
    draw = partial(
        texts.calibration_sequences,
        [read[source] for source in recipe.calibration],
        tokenizer,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        random_tokens=fraction_of(recipe.random_tokens, predicts_next_token(model), written),
        vocab_size=known_tokens(model, model.config),
        packed=predicts_next_token(model),
        certify=recipe.certify,
    )
    short = []
    try:
        calibration = draw(judge=judge)
    except InputError:  # the text may be too short for one part more
        calibration = draw()
        short = [UNMEASURED] if judge and len(calibration) < LEAST else []
    evaluation = evaluation_batches(recipe, held_out, model, tokenizer)
    facts["bos"] = calibration.bos
    if recipe.eval:
        facts["eval"] = recipe.eval
    kinds = warnings_of(recipe.calibration, predicts_next_token(model), recipe.self_text)
    warnings = [*calibration.notes, *short, *kinds]
    known = None
    if digests:
        every = (text for documents in read.values() for text in documents)
        known = torch.tensor(sorted(document_digests(every)))
    batches = calibration.batches(recipe.batch_size)
    apart = [
        None if some is None else some.batches(recipe.batch_size)
        for some in (calibration.certification, calibration.judging)
    ]
    return batches, evaluation, *apart, facts, warnings, calibration.notes, known


def warnings_of(names: Sequence[str], causal: bool, self_text: float) -> list[str]:
    """Return what a user has to know of the kinds of calibration text."""
    alone = len(set(names)) == 1 and SELF not in names and self_text == 0
    return [ONE_KIND] if alone and causal else []


def check_unloaded(recipe: Recipe) -> None:
    """Refuse what can be told before the model is loaded, which may take minutes."""
    from liar_ext.latency_table import LatencyTable

    if recipe.latency_table is not None:
        LatencyTable.load(recipe.latency_table)


def evaluation_batches(
    recipe: Recipe, held_out: Sequence[str] | None, model: nn.Module, tokenizer: Any
) -> list[dict[str, Tensor]] | None:
    """Return the batches of the held-out text, if there is one."""
    from liar_ext.data import texts

    if held_out is None:
        return None
    return texts.evaluation_sequences(
        held_out,
        tokenizer,
        seq_len=recipe.seq_len,
        samples=recipe.eval_samples,
        packed=predicts_next_token(model),
    ).batches(recipe.batch_size)


def _written(
    model: nn.Module, tokenizer: Any, recipe: Recipe, *, judge: int, progress: bool, sketch: bool
) -> tuple[Sequence[str], float]:
    """Return the model's own share of the calibration text, and the seconds to write it."""
    from liar_ext.calibration.self_calibration import enough_documents, write_documents

    start = time.perf_counter()
    share = -(-(recipe.samples + recipe.certify + judge) // len(recipe.calibration))
    tokens = min(recipe.seq_len, SKETCHED) if sketch else recipe.seq_len
    written = write_documents(
        model,
        tokenizer,
        documents=enough_documents(share),
        tokens=tokens,
        seed=recipe.seed,
        progress=progress,
    )
    times = -(-recipe.seq_len // tokens)
    if sketch:  # once more, as what is read again may be fewer tokens
        written = [(times + 1) * text for text in written]
    return written, times * (time.perf_counter() - start)


def _check_complete(recipe: Recipe, options: argparse.Namespace) -> None:
    """Refuse a job that lacks one of the three that have no default."""
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
            f"prune: needs {', '.join(names)}; a first run is liar prune MODEL --calibration "
            "text.txt --out pruned, MODEL before --calibration"
        )
