"""Banks of activation statistics: ``liar calibrate``, ``merge``, ``sweep``, and jobs by a bank."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from liar_ext.calibration import documents, texts
from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.saved_sums import bytes_of_sums, check_memory
from liar_ext.checkpoint.folder import count_params
from liar_ext.checkpoint.placing import check_folder, check_place
from liar_ext.checkpoint.readers import kind_of, load_reader
from liar_ext.checkpoint.saving import fill_folder, writing
from liar_ext.cli import inputs
from liar_ext.cli.inputs import Given, let_write, load
from liar_ext.cli.main import show
from liar_ext.cli.options import check_complete, recipe_of
from liar_ext.cli.resume import check_apart, checkpoint_of
from liar_ext.job.planning import PROBE_KEEP, Sweep, sweep
from liar_ext.job.state import tokens_gone
from liar_ext.job.vocabulary import SAME_VOCABULARY, shares_budget
from liar_ext.models.recipe import Recipe
from liar_ext.models.recipe_fields import DTYPES, option_of, recipe_fields
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import sites
from liar_ext.report.report import Report
from liar_ext.report.sections import vocabulary_lines
from liar_ext.report.tables import Table, figure, measured, quality, to_text
from liar_ext.system.checkpoint_store import RESULT
from liar_ext.system.distributed import is_first
from liar_ext.system.errors import InputError

UNCHECKED = (
    "The bank has no digests of its documents: nobody has looked whether the evaluation text "
    "shares some with it."
)


def run(options: argparse.Namespace) -> None:
    """Check what is asked for, and do it."""
    recipe = recipe_of(options)
    given = {"MODEL": recipe.model, "--calibration TEXT": recipe.calibration}
    example = "for one liar calibrate MODEL --calibration text.txt --out moments.safetensors"
    check_complete("calibrate", {**given, "--out FILE": options.out}, example)
    run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> None:
    """Load, draw text, run the model over it, write."""
    start = time.perf_counter()
    check_bank_place(options.out, "calibrate", options.overwrite)
    check_apart(options)
    with checkpoint_of(recipe, options) as saved:
        loaded = load(recipe)
        at = sites(loaded.model, attn_unit=recipe.attn_unit)
        check_memory("calibrate", sum(bytes_of_sums(site.d_in) for site in at))
        let_write(loaded, saved)
        how = {"keep_text": not options.no_text, "checkpoint": saved}
        bank = calibrate(loaded.model, loaded.calibration, at, **how)
        if options.sensitivities:
            work = Sweep(loaded.model, loaded.calibration, bank, saved=saved, probe_keep=PROBE_KEEP)
            work.plan(recipe)
            work.known.store_sensitivities(bank)
        if not is_first():
            return
        bank.source |= {"texts": list(recipe.calibration), "calibrations": [_drawing(loaded)]}
        if loaded.tokenizer is not None:
            bank.source["tokenizer"] = texts.tokenizer_fingerprint(loaded.tokenizer)
        bank.documents = loaded.documents
        if saved is not None:
            names = ("model", "dtype", "data")
            saved.put(RESULT, facts={name: bank.source[name] for name in names})
        save_bank(bank, options.out, "calibrate", options.overwrite)
    megabytes = os.stat(options.out).st_size / 1e6
    facts = {"out": options.out, "layers": len(bank), "megabytes": megabytes}
    facts |= {name: bank.source[name] for name in ("tokens", "sequences")}
    facts |= {"text": bank.text is not None, "seconds": time.perf_counter() - start}
    bare = ", without their text" if bank.text is None else ""
    lines = [] if options.quiet else [f"{_summary(options.out, bank)}, {megabytes:,.1f} MB{bare}"]
    show(options, facts, lines, loaded.warnings)


def _drawing(loaded: Given) -> dict[str, Any]:
    """Return how the sequences of a bank were drawn, for its facts."""
    recipe, names = loaded.recipe, [each.name for each in recipe_fields(in_bank="text")]
    facts = {name: getattr(recipe, name) for name in names if name != "calibration"}
    facts |= {"texts": list(recipe.calibration), "bos": loaded.facts["bos"]}
    facts["notes"] = [note for note in loaded.notes if note.isprintable()]
    return facts | {"packed": predicts_next_token(loaded.model)}


def _summary(path: str, bank: MomentBank) -> str:
    return (
        f"{path}: moments of {len(bank)} sites over {bank.source['tokens']:,} tokens "
        f"in {bank.source['sequences']} sequences"
    )


def run_merge(options: argparse.Namespace) -> None:
    """Check what the banks say of themselves, add them, write."""
    if len(options.banks) < 2:
        raise InputError("merge: needs at least two banks to add, got one; name another")
    check_bank_place(options.out, "merge", options.overwrite)
    headers = {path: MomentBank.load(path, sums=False) for path in options.banks}
    # One order, whatever that of the arguments is: so the sum is the same to the last bit.
    order = sorted(options.banks, key=lambda path: (headers[path].source.get("data", []), path))
    total = MomentBank.load(order[0])
    for at, path in enumerate(order[1:], 1):
        try:
            total.merge(MomentBank.load(path))
        except InputError as error:
            done, why = ", ".join(order[:at]), str(error).removeprefix("MomentBank.merge: ")
            raise InputError(f"merge: {path} can't be added to {done}: {why}") from None
    save_bank(total, options.out, "merge", options.overwrite)
    notes = []
    if textless := [path for path in order if headers[path].text is None]:
        notes.append(f"The text is left out, since {', '.join(textless)} has none.")
    if any(header.source.get("sensitivities") for header in headers.values()):
        notes.append(
            "Sensitivities are left out: they were measured by the sums of one bank alone."
        )
    if not options.quiet:
        show(options, {}, [f"{_summary(options.out, total)} of {len(order)} banks"], notes)


def check_bank_place(path: str, command: str, overwrite: bool) -> None:
    """Raise InputError unless a bank may be written to ``path``."""
    check_place(Path(path), command, "--out", lambda _: True)
    if not Path(path).exists():
        return
    with suppress(InputError):  # it is no bank
        MomentBank.load(path, sums=False)
        if overwrite:
            return
    raise InputError(
        f"{command}: {path} exists; give another name with --out, or --overwrite, "
        "which replaces a bank and nothing else"
    )


def save_bank(bank: MomentBank, path: str, command: str, overwrite: bool) -> None:
    """Write a bank; if something came to its place meanwhile, under a name that an error says."""
    try:
        check_bank_place(path, command, overwrite)
    except InputError as error:
        place = Path(path)
        kept = place.with_name(f"{place.stem}.{uuid4().hex[:8]}{place.suffix}")
        bank.save(kept)
        raise InputError(
            f"{command}: this bank is in {kept}; {path} has changed while this ran, and was left "
            f"alone: {str(error).removeprefix(f'{command}: ')}"
        ) from None
    bank.save(path)


def load_by_bank(recipe: Recipe, options: argparse.Namespace) -> Given:
    """Return what a recipe names, and the bank."""
    path = options.bank
    header = MomentBank.load(path, sums=False)
    recipe = recipe_of_bank(recipe, header.source, options)
    kind = kind_of(recipe.model, [recipe.eval])
    held_out = inputs.read_source(recipe.eval, kind) if recipe.eval else None
    warnings = warnings_of_bank(header)
    if held_out is not None and header.documents is None:
        warnings.append(UNCHECKED)
    elif held_out is not None:
        documents.check_apart(set(header.documents.tolist()), held_out)
    inputs.check_unloaded(recipe)
    model, tokenizer = inputs.load_with_tokenizer(recipe.model, recipe.dtype, recipe.device)
    known = header.source.get("tokenizer")
    own = None if tokenizer is None else texts.tokenizer_fingerprint(tokenizer)
    if known is not None and known != own:
        raise InputError(
            f"{options.command}: the text of {path} was read by another tokenizer than that of "
            f"{recipe.model}; give the model that was calibrated, or calibrate this one"
        )
    reads = tokenizer if kind is None else load_reader(kind, recipe.model, model)
    evaluation = inputs.evaluation_batches(recipe, held_out, model, reads)
    bank = MomentBank.load(path)
    (*_, last) = bank.source.get("calibrations") or [{"bos": ""}]
    facts: dict[str, object] = {"calibration": bank.source.get("texts", []), "bank": path}
    facts |= {"seq_len": recipe.seq_len, "bos": last["bos"]}
    facts |= {"eval": recipe.eval} if recipe.eval else {}
    return Given(
        recipe, model, tokenizer, bank, evaluation=evaluation, facts=facts, warnings=warnings
    )


def recipe_of_bank(recipe: Recipe, source: dict[str, Any], options: argparse.Namespace) -> Recipe:
    """Return a recipe with the calibration that a bank holds.

    A bank of one calibration gives a recipe by which that can be run again.
    """
    held = "is of the calibration, which the bank holds already"
    bare = "does not work with a bank, which has no text or layers beside its own"
    own = [each for each in recipe_fields(in_bank="text") if hasattr(options, each.name)]
    refused = [f"{option_of(each)} {held}" for each in own]
    refused += [f"{recipe.spelled(each)} {bare}" for each in recipe.without("with_bank")]
    if refused:
        raise InputError(f"{options.command}: {refused[0]}; leave it out, or leave --bank out")
    changes: dict[str, Any] = {"calibration": ()}
    runs = source.get("calibrations", [])
    if len(runs) == 1:
        said = {**runs[0], "calibration": runs[0]["texts"]}
        changes = {each.name: said.get(each.name) for each in recipe_fields(in_bank="text")}
    elif source.get("seq_len", 0) > 1:
        changes["seq_len"] = source["seq_len"]
    if not hasattr(options, "dtype") and source.get("dtype") in DTYPES:
        changes["dtype"] = source["dtype"]
    return replace(recipe, **changes)


def warnings_of_bank(header: MomentBank) -> list[str]:
    """Return what a user has to know of the text that a bank was made of."""
    runs = header.source.get("calibrations", [])
    found = [note for run in runs for note in run["notes"]]
    if header.source.get("texts") and runs:
        own = any(run["self_text"] for run in runs)
        found += inputs.warnings_of(header.source["texts"], runs[0]["packed"], own)
    return list(dict.fromkeys(found))


def run_sweep(options: argparse.Namespace) -> None:
    """Load, decide, prune and save what is asked for, print the table."""
    keep = options.keep
    del options.keep  # a recipe has one
    recipe = recipe_of(options)
    if len({f"{each:g}" for each in keep}) < len(keep):  # names of folders
        raise InputError(f"sweep: --keep must name each fraction once, got {keep}")
    text = {"--bank FILE or --calibration TEXT": options.bank or recipe.calibration}
    example = "for one liar sweep MODEL --bank moments.safetensors, which liar calibrate writes"
    check_complete("sweep", {"MODEL": recipe.model, **text}, example)
    if shares_budget(recipe):
        raise InputError(
            "sweep: --keep-vocab auto takes another vocabulary for each budget of params; give a "
            "number of tokens, or run liar prune for each"
        )
    folders = {each: Path(options.out, f"keep-{each:g}") for each in keep} if options.out else {}
    for folder in folders.values():
        check_folder(folder, options.overwrite)
    given = load_by_bank(recipe, options) if options.bank else load(recipe)
    let_write(given)

    def save(pruned: nn.Module, report: Report) -> None:
        given.add_to(report, pruned)
        with writing(folders[report.recipe.keep], options.overwrite) as path:
            fill_folder(pruned, path, report.plan, report=report, tokenizer=given.tokenizer)

    more = {"bank": given.bank, "evaluate_on": given.evaluation}
    more["on_result"] = save if folders else None
    points = sweep(given.model, given.calibration, given.recipe, keep=keep, **more)
    whole = count_params(given.model) + tokens_gone(given.model)
    dense = {"params": whole, "flops": 1.0, "time": points[0].time and 1.0}
    dense |= points[0].quality("dense")
    rows = [point.to_dict() for point in points]
    for row in rows if folders else ():
        row["folder"] = str(folders[row["keep"]])
    notes = list(given.warnings)
    if given.vocabulary is not None and (facts := given.vocabulary.facts):
        fewer = facts["after"] < facts["before"]
        notes += [SAME_VOCABULARY] * (fewer and bool(measured(dense))) + vocabulary_lines(facts)
    show(options, {"dense": dense, "budgets": rows}, to_text(sweep_table(dense, rows)), notes)


def sweep_table(dense: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the dense model and each budget."""
    judged = measured(dense)
    predicted = "predicted divergence"  # beside a measured one
    timed = ("predicted time",) if rows[0].get("time") else ()
    heads = ("keep", predicted, "parameters", "of dense", "operations", *timed, *judged, "seconds")
    cells = [
        (
            str(row["keep"]),
            figure(row.get("predicted_divergence"), ".4g"),
            f"{row['params']:,}",
            f"{row['params'] / dense['params']:.1%}",
            f"{row['flops']:.1%}",
            *(f"{row['time']:.1%}" for _ in timed),
            *(quality(row.get(name)) for name in judged),
            figure(row.get("seconds"), ".1f"),
        )
        for row in [{"keep": "dense", **dense}, *rows]
    ]
    return Table("", heads, cells, ())
