"""``liar calibrate``: the activation statistics of a model as a file."""

from __future__ import annotations

import argparse
import os
import time

from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.memory import bytes_of_sums, check_memory
from liar_ext.checkpoint_store import RESULT
from liar_ext.cli.inputs import load
from liar_ext.cli.options import recipe_of
from liar_ext.cli.output import print_json, warn
from liar_ext.cli.own_text import let_write
from liar_ext.cli.resume import check_apart, checkpoint_of
from liar_ext.cli.with_bank import calibrations, check_bank_place, save_bank
from liar_ext.data.texts import tokenizer_fingerprint
from liar_ext.distributed import is_first
from liar_ext.errors import InputError
from liar_ext.models.running import predicts_next_token
from liar_ext.models.sites import sites
from liar_ext.pipeline.sweep import PROBE_KEEP, Sweep
from liar_ext.recipe import Recipe


def run(options: argparse.Namespace) -> None:
    """Check what is asked for, and do it."""
    recipe = recipe_of(options)
    missing = {
        "MODEL": not recipe.model,
        "--calibration TEXT": not recipe.calibration,
        "--out FILE": not options.bank,
    }
    names = [name for name, lacks in missing.items() if lacks]
    if names:
        raise InputError(
            f"calibrate: liar calibrate needs {', '.join(names)}; for one liar calibrate MODEL "
            "--calibration text.txt --out moments.safetensors, MODEL before --calibration"
        )
    run_recipe(recipe, options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> None:
    """Load, draw text, run the model over it, write."""
    start = time.perf_counter()
    check_bank_place(options.bank, "calibrate", "--out", options.overwrite)
    check_apart(options)
    loaded = load(recipe, progress=options.progress, digests=True)
    at = sites(loaded.model, attn_unit=recipe.attn_unit)
    check_memory("calibrate", sum(bytes_of_sums(site.d_in) for site in at))
    packed = predicts_next_token(loaded.model)
    with checkpoint_of(recipe, options) as saved:
        let_write(loaded, recipe, saved, progress=options.progress)
        bank = calibrate(
            loaded.model,
            loaded.calibration,
            at,
            keep_text=not options.no_text,
            checkpoint=saved,
            progress=options.progress,
        )
        if options.sensitivities:
            given = loaded.model, loaded.calibration, bank, options.progress
            work = Sweep(*given, saved=saved, probe_keep=PROBE_KEEP)
            work.plan(recipe)
            work.known.store_sensitivities(bank)
        if not is_first():
            return
        bank.source |= {
            "texts": list(recipe.calibration),
            "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
            "calibrations": calibrations(recipe, loaded.facts["bos"], loaded.notes, packed),
        }
        bank.documents = loaded.documents
        if saved is not None:
            saved.put(
                RESULT, facts={name: bank.source[name] for name in ("model", "dtype", "data")}
            )
        save_bank(bank, options.bank, "calibrate", "--out", options.overwrite)
    megabytes = os.stat(options.bank).st_size / 1e6
    if options.json:
        facts = {"out": options.bank, "layers": len(bank), "megabytes": megabytes}
        facts |= {name: bank.source[name] for name in ("tokens", "sequences")}
        facts |= {"text": bank.text is not None, "seconds": time.perf_counter() - start}
        print_json(facts, loaded.warnings)
    elif not options.quiet:
        print(
            f"{options.bank}: moments of {len(bank)} sites over {bank.source['tokens']:,} tokens "
            f"in {bank.source['sequences']} sequences, {megabytes:,.1f} MB"
            f"{', without their text' if bank.text is None else ''}",
            flush=True,
        )
        warn(loaded.warnings)
