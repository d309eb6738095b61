"""``liar calibrate`` and ``liar merge``: banks of activation statistics."""

from __future__ import annotations

import argparse
import os
import time

from liar_ext.calibration.bank_file import read_bank
from liar_ext.calibration.collect import calibrate
from liar_ext.calibration.moments import MomentBank
from liar_ext.calibration.saved_sums import bytes_of_sums, check_memory
from liar_ext.calibration.texts import tokenizer_fingerprint
from liar_ext.checkpoint_store import RESULT
from liar_ext.cli.inputs import let_write, load
from liar_ext.cli.options import recipe_of
from liar_ext.cli.output import print_json, warn
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
    checked = MomentBank(source=headers[order[0]].source)
    checked.sequences = headers[order[0]].sequences
    for path in order[1:]:
        header = headers[path]
        with _naming(path, order[: order.index(path)]):
            checked.merge(MomentBank(source=header.source, sequences=header.sequences))
    total = MomentBank.load(order[0])
    for path in order[1:]:
        with _naming(path, order[: order.index(path)]):
            total.merge(MomentBank.load(path))
    save_bank(total, options.out, "merge", "--out", options.overwrite)
    if not options.quiet:
        print(
            f"{options.out}: moments of {len(total)} sites over {total.source['tokens']:,} tokens "
            f"in {total.source['sequences']} sequences of {len(order)} banks"
        )
        bare = [path for path in order if headers[path].text is None]
        if bare:
            warn([f"The text is left out, since {', '.join(bare)} has none."])
        if any(header.source.get("sensitivities") for header in headers.values()):
            warn(["Sensitivities are left out: they were measured by the sums of one bank alone."])


class _naming:
    """Let an error of adding a bank say which one it is."""

    def __init__(self, path: str, done: list[str]) -> None:
        self.path, self.done = path, done

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and str(error).startswith("MomentBank.merge: "):
            why = str(error).removeprefix("MomentBank.merge: ")
            raise InputError(
                f"merge: {self.path} can't be added to {', '.join(self.done)}: {why}"
            ) from None
