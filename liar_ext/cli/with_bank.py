"""Jobs by a moment bank: which file may be written, and the model and recipe that go with one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from liar_ext.atomic_write import check_place
from liar_ext.calibration import texts
from liar_ext.calibration.bank_file import Stored, read_bank
from liar_ext.calibration.documents import check_apart_from
from liar_ext.calibration.moments import MomentBank
from liar_ext.checkpoint.processors import kind_of, load_reader
from liar_ext.cli.inputs import (
    Given,
    check_unloaded,
    evaluation_batches,
    load_with_tokenizer,
    read_source,
    warnings_of,
)
from liar_ext.cli.output import check_device
from liar_ext.errors import InputError, one_line
from liar_ext.recipe import Recipe
from liar_ext.recipe.fields import DTYPES, recipe_fields
from liar_ext.recipe.option import option_of

UNCHECKED = (
    "The bank has no digests of its documents: nobody has looked whether the evaluation text "
    "shares some with it."
)


def check_bank_place(path: str, command: str, option: str, overwrite: bool) -> None:
    """Raise InputError unless a bank may be written to ``path``."""

    def is_ours(path: Path) -> bool:
        try:
            read_bank(path, sums=False)
        except InputError:
            return False
        return overwrite

    try:
        check_place(Path(path), command, option, is_ours)
    except InputError as error:
        if "exists and" in str(error):
            raise InputError(
                f"{command}: {path} exists; give another name with {option}, or --overwrite, "
                "which replaces a bank and nothing else"
            ) from None
        raise


def save_bank(bank: MomentBank, path: str, command: str, option: str, overwrite: bool) -> None:
    """Write a bank where :func:`check_bank_place` was content, if it still is.

    Raises
    ------
    InputError
        If something came there meanwhile: the bank has another name then, which the error says.
    """

    def take(made: str, place: Path) -> None:
        try:
            try:  # unlike a rename, a link replaces nothing
                os.link(made, place)
            except OSError:  # something is there, or the file system has no links
                check_bank_place(path, command, option, overwrite)
                os.replace(made, place)
        except (OSError, InputError) as error:
            kept = place.with_name(f"{place.stem}.{uuid4().hex[:8]}{place.suffix}")
            os.replace(made, kept)
            raise InputError(
                f"{command}: this bank is in {kept}; {path} has changed while this ran, and was "
                f"left alone: {one_line(error).removeprefix(f'{command}: ')}"
            ) from error

    bank.save(path, take)


def load_by_bank(
    path: str, recipe: Recipe, options: argparse.Namespace
) -> tuple[Given, MomentBank, Recipe]:
    """Return what a recipe names, the bank, and the recipe with what the bank says.

    Raises
    ------
    InputError
        If options contradict the bank, or one of model, bank and text can't be used.
    """
    header = read_bank(path, sums=False)
    recipe = recipe_of_bank(recipe, header.source, options)
    kind = kind_of(recipe.model)
    held_out = read_source(recipe.eval, kind) if recipe.eval else None
    warnings = warnings_of_bank(header)
    if held_out is not None:
        if header.documents is None:
            warnings.append(UNCHECKED)
        else:
            check_apart_from(set(header.documents.tolist()), held_out)
    check_device(recipe.device)
    check_unloaded(recipe)
    model, tokenizer = load_with_tokenizer(recipe.model, recipe.dtype, recipe.device)
    known = header.source.get("tokenizer")
    own = None if tokenizer is None else texts.tokenizer_fingerprint(tokenizer)
    if known is not None and known != own:
        raise InputError(
            f"{options.command}: the text of {path} was read by another tokenizer than that of "
            f"{recipe.model}; give the model that was calibrated, or calibrate this one"
        )
    reads = tokenizer if kind is None else load_reader(kind, recipe.model, model)
    evaluation = evaluation_batches(recipe, held_out, model, reads)
    bank = MomentBank.load(path)
    facts: dict[str, object] = {"calibration": bank.source.get("texts", []), "bank": path}
    facts |= {"seq_len": recipe.seq_len, "bos": _last(bank.source, "bos", "")}
    facts |= {"eval": recipe.eval} if recipe.eval else {}
    return Given(model, tokenizer, None, evaluation, None, None, facts, warnings), bank, recipe


def recipe_of_bank(recipe: Recipe, source: dict[str, Any], options: argparse.Namespace) -> Recipe:
    """Return a recipe with the calibration that a bank holds.

    A bank of one calibration gives a recipe by which that can be run again.
    """
    for each in recipe_fields(in_bank="text"):
        if hasattr(options, each.name):
            raise InputError(
                f"{options.command}: {option_of(each)} is of the calibration, which the bank holds "
                "already; leave it out, or leave --bank out"
            )
    for each in recipe.without("with_bank"):
        raise InputError(
            f"{options.command}: {recipe.spelled(each)} does not work with a bank, which has no "
            "text or layers beside its own; leave it out, or leave --bank out"
        )
    changes: dict[str, Any] = {"calibration": ()}
    runs = [_drawn(run) for run in source.get("calibrations", [])]
    if len(runs) == 1:
        changes = runs[0]
    elif source.get("seq_len", 0) > 1:
        changes["seq_len"] = source["seq_len"]
    if not hasattr(options, "dtype") and source.get("dtype") in DTYPES:
        changes["dtype"] = source["dtype"]
    return replace(recipe, **changes)


def warnings_of_bank(header: Stored) -> list[str]:
    """Return what a user has to know of the text that a bank was made of."""
    runs = header.source.get("calibrations", [])
    found = [note for run in runs for note in run["notes"]]
    if header.source.get("texts") and runs:
        most = max(_drawn(run)["self_text"] for run in runs)
        found += warnings_of(header.source["texts"], runs[0]["packed"], most)
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
        each.name: each.metadata["check"](each.name, said.get(each.name, each.metadata["unsaid"]))
        for each in recipe_fields(in_bank="text")
    }


def _last(source: dict[str, Any], name: str, default: Any) -> Any:
    runs = source.get("calibrations", [])
    return runs[-1][name] if runs else default
