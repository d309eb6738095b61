"""Banks of activation statistics: ``liar calibrate``, ``liar merge``, and jobs by a bank."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from liar_ext.calibration import documents, texts
from liar_ext.calibration.bank import MomentBank
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.saved_sums import bytes_of_sums, check_memory
from liar_ext.checkpoint.loading import kind_of, load_reader
from liar_ext.checkpoint.placing import check_place
from liar_ext.cli import inputs
from liar_ext.cli.inputs import Given, let_write, load
from liar_ext.cli.options import check_complete, recipe_of
from liar_ext.cli.output import show
from liar_ext.cli.resume import check_apart, checkpoint_of
from liar_ext.job.sweeping import PROBE_KEEP, Sweep
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import sites
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import DTYPES, option_of, recipe_fields
from liar_ext.system.checkpoint_store import RESULT
from liar_ext.system.distributed import is_first
from liar_ext.system.errors import InputError, one_line

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
        packed = predicts_next_token(loaded.model)
        let_write(loaded, saved)
        how = {"keep_text": not options.no_text, "checkpoint": saved}
        bank = calibrate(loaded.model, loaded.calibration, at, **how)
        if options.sensitivities:
            given = loaded.model, loaded.calibration, bank
            work = Sweep(*given, saved=saved, probe_keep=PROBE_KEEP)
            work.plan(recipe)
            work.known.store_sensitivities(bank)
        if not is_first():
            return
        bank.source |= {
            "texts": list(recipe.calibration),
            "calibrations": calibrations(recipe, loaded.facts["bos"], loaded.notes, packed),
        }
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
    if len(headers) < len(options.banks):
        raise InputError("merge: one bank is named twice, which would count its text twice")
    # One order, whatever that of the arguments is: so the sum is the same to the last bit.
    order = sorted(headers, key=lambda path: (headers[path].source.get("data", []), path))
    bare = {p: MomentBank(source=h.source, sequences=h.sequences) for p, h in headers.items()}
    _added(order, bare.get)  # refuses before sums are read
    total = _added(order, MomentBank.load)
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


def _added(paths: list[str], load: Callable[[str], MomentBank]) -> MomentBank:
    """Return the sum of banks; an error says which one can't be added."""
    total = load(paths[0])
    for at, path in enumerate(paths[1:], 1):
        bank = load(path)
        try:
            total.merge(bank)
        except InputError as error:
            done, why = ", ".join(paths[:at]), str(error).removeprefix("MomentBank.merge: ")
            raise InputError(f"merge: {path} can't be added to {done}: {why}") from None
        del bank  # before the next one is there
    return total


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

    def take(made: str, place: Path) -> None:
        try:
            try:  # unlike a rename, a link replaces nothing
                os.link(made, place)
            except OSError:  # something is there, or the file system has no links
                check_bank_place(path, command, overwrite)
                os.replace(made, place)
        except (OSError, InputError) as error:
            kept = place.with_name(f"{place.stem}.{uuid4().hex[:8]}{place.suffix}")
            os.replace(made, kept)
            raise InputError(
                f"{command}: this bank is in {kept}; {path} has changed while this ran, and was "
                f"left alone: {one_line(error).removeprefix(f'{command}: ')}"
            ) from error

    bank.save(path, take)


def load_by_bank(recipe: Recipe, options: argparse.Namespace) -> Given:
    """Return what a recipe names, and the bank."""
    path = options.bank
    header = MomentBank.load(path, sums=False)
    recipe = recipe_of_bank(recipe, header.source, options)
    kind = kind_of(recipe.model, [recipe.eval])
    held_out = inputs.read_source(recipe.eval, kind) if recipe.eval else None
    warnings = warnings_of_bank(header)
    if held_out is not None:
        if header.documents is None:
            warnings.append(UNCHECKED)
        else:
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
    facts: dict[str, object] = {"calibration": bank.source.get("texts", []), "bank": path}
    (*_, last) = bank.source.get("calibrations") or [{"bos": ""}]
    facts |= {"seq_len": recipe.seq_len, "bos": last["bos"]}
    facts |= {"eval": recipe.eval} if recipe.eval else {}
    text = {"evaluation": evaluation, "facts": facts, "warnings": warnings}
    return Given(recipe, model, tokenizer, bank, **text)


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
    runs = [_drawn(run) for run in source.get("calibrations", [])]
    if len(runs) == 1:
        changes = runs[0]
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
        most = max(_drawn(run)["self_text"] for run in runs)
        found += inputs.warnings_of(header.source["texts"], runs[0]["packed"], most)
    return list(dict.fromkeys(found))


def calibrations(recipe: Recipe, bos: str, notes: Sequence[str], packed: bool) -> list[dict]:
    """Return how the sequences of a bank were drawn, for its facts."""
    facts = {each.name: getattr(recipe, each.name) for each in recipe_fields(in_bank="text")}
    texts, shown = facts.pop("calibration"), [note for note in notes if note.isprintable()]
    return [{**facts, "texts": list(texts), "bos": bos, "notes": shown, "packed": packed}]


def _drawn(run: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe by which one calibration of a bank was drawn."""
    said = {**run, "calibration": run["texts"]}
    return {
        each.name: each.metadata["check"](each.name, said.get(each.name))
        for each in recipe_fields(in_bank="text")
    }
