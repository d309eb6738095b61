"""``liar calibrate`` and ``liar merge``: banks of activation statistics."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

from liar_ext.calibration.bank_file import Stored, read_bank
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.saved_sums import bytes_of_sums, check_memory
from liar_ext.calibration.texts import tokenizer_fingerprint
from liar_ext.checkpoint_store import RESULT
from liar_ext.cli.inputs import let_write, load
from liar_ext.cli.options import check_complete, recipe_of
from liar_ext.cli.output import show
from liar_ext.cli.resume import check_apart, checkpoint_of
from liar_ext.cli.with_bank import calibrations, check_bank_place, save_bank
from liar_ext.distributed import is_first
from liar_ext.errors import InputError
from liar_ext.job.sweeping import PROBE_KEEP, Sweep
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import sites
from liar_ext.recipe import Recipe


def run(options: argparse.Namespace) -> None:
    """Check what is asked for, and do it."""
    recipe = recipe_of(options)
    given = {"MODEL": recipe.model, "--calibration TEXT": recipe.calibration}
    example = "for one liar calibrate MODEL --calibration text.txt --out moments.safetensors"
    check_complete("calibrate", {**given, "--out FILE": options.bank}, example)
    run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> None:
    """Load, draw text, run the model over it, write."""
    start = time.perf_counter()
    check_bank_place(options.bank, "calibrate", "--out", options.overwrite)
    check_apart(options)
    loaded = load(recipe, progress=options.progress)
    at = sites(loaded.model, attn_unit=recipe.attn_unit)
    check_memory("calibrate", sum(bytes_of_sums(site.d_in) for site in at))
    packed = predicts_next_token(loaded.model)
    with checkpoint_of(recipe, options) as saved:
        let_write(loaded, recipe, saved, progress=options.progress)
        how = {"keep_text": not options.no_text, "checkpoint": saved}
        bank = calibrate(loaded.model, loaded.calibration, at, **how, progress=options.progress)
        if options.sensitivities:
            given = loaded.model, loaded.calibration, bank, options.progress
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
            bank.source["tokenizer"] = tokenizer_fingerprint(loaded.tokenizer)
        bank.documents = loaded.documents
        if saved is not None:
            saved.put(
                RESULT, facts={name: bank.source[name] for name in ("model", "dtype", "data")}
            )
        save_bank(bank, options.bank, "calibrate", "--out", options.overwrite)
    megabytes = os.stat(options.bank).st_size / 1e6
    facts = {"out": options.bank, "layers": len(bank), "megabytes": megabytes}
    facts |= {name: bank.source[name] for name in ("tokens", "sequences")}
    facts |= {"text": bank.text is not None, "seconds": time.perf_counter() - start}
    bare = ", without their text" if bank.text is None else ""
    lines = [] if options.quiet else [f"{_summary(options.bank, bank)}, {megabytes:,.1f} MB{bare}"]
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
    check_bank_place(options.out, "merge", "--out", options.overwrite)
    headers = {path: read_bank(path, sums=False) for path in options.banks}
    if len(headers) < len(options.banks):
        raise InputError("merge: one bank is named twice, which would count its text twice")
    # One order, whatever that of the arguments is: so the sum is the same to the last bit.
    order = sorted(headers, key=lambda path: (headers[path].source.get("data", []), path))
    _added(order, lambda path: _without_sums(headers[path]))  # refuses before sums are read
    total = _added(order, MomentBank.load)
    save_bank(total, options.out, "merge", "--out", options.overwrite)
    notes = []
    bare = [path for path in order if headers[path].text is None]
    if bare:
        notes.append(f"The text is left out, since {', '.join(bare)} has none.")
    if any(header.source.get("sensitivities") for header in headers.values()):
        one = "they were measured by the sums of one bank alone."
        notes.append(f"Sensitivities are left out: {one}")
    if not options.quiet:
        show(options, {}, [f"{_summary(options.out, total)} of {len(order)} banks"], notes)


def _without_sums(stored: Stored) -> MomentBank:
    return MomentBank(source=stored.source, sequences=stored.sequences)


def _added(paths: list[str], load: Callable[[str], MomentBank]) -> MomentBank:
    """Return the sum of banks; an error says which one can't be added."""
    total = load(paths[0])
    for at, path in enumerate(paths[1:], 1):
        try:
            total.merge(load(path))
        except InputError as error:
            said = str(error)
            if not said.startswith("MomentBank.merge: "):
                raise
            why = said.removeprefix("MomentBank.merge: ")
            done = ", ".join(paths[:at])
            raise InputError(f"merge: {path} can't be added to {done}: {why}") from None
    return total
