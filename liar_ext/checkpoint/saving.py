"""Save a pruned model to a folder, whole or not at all.

Weights are safetensors, written and read by transformers itself. What else a folder holds depends
on what the stock class of the model can build::

    equal layers      config.json says the new sizes          any loader takes the folder
    unequal layers    config.json says the dense sizes, and   load_pruned takes it, and so does a
                      per_layer_config and liar the real      stock loader that may run the code of
                      ones; liar_loader.py builds them        the folder; else it stops at the sizes
    always            liar/plan.json                          what stays, of the dense model
                      liar/fingerprint.safetensors            for verify_pruned
                      liar/manifest.json                      what may be overwritten one day

None of ``liar/`` is needed to load, so that what tools leave behind is no loss.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from liar_ext.checkpoint.carrying import carry, complete_config, license_of, source_folder
from liar_ext.checkpoint.fingerprint import write_fingerprint, write_manifest
from liar_ext.checkpoint.names import (
    CARD_FILE,
    MARKER_FILE,
    OWN_FOLDER,
    PLAN_FILE,
    QUANTISER_MARKS,
    REPORT_JSON,
)
from liar_ext.checkpoint.placing import beside, check_folder, put_in_place
from liar_ext.checkpoint.quietening import no_bars, quiet
from liar_ext.checkpoint.stock_config import described, wear
from liar_ext.checkpoint.tokenization import leave_larger, write_vocabulary
from liar_ext.checkpoint.weights import Shards
from liar_ext.errors import InputError, one_line
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import sites
from liar_ext.plan import Plan

__all__ = ["PLAN_FILE", "check_folder", "save_pruned"]


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    report: Any = None,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a pruned model to a folder: weights, config, tokenizer, plan, report and fingerprint.

    All is written beside the folder and takes its place at the end, at once, so that neither a
    failure nor a kill leaves half a folder or loses one. The model itself stays as it is. A model
    that was read from GGUF is saved as an ordinary one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model after :func:`liar_ext.apply_plan`.
    folder : path
        Where to write; its parents are made.
    plan : Plan, optional
        The plan that was applied; by default that of the report.
    report : Report or mapping, optional
        Anything with ``save(folder)``, or a mapping that is written as ``liar/report.json``. It is
        written last. If it has ``seconds``, a dict, those of saving are put there first as
        ``save``, and added to ``total`` if that is there.
    tokenizer : optional
        Tokenizer or processor to save, with its chat template.
    source : path or str, optional
        The folder that the model was loaded from, whose other files go along: see
        :mod:`liar_ext.checkpoint.carrying`. By default the one that the model's config names.
    overwrite : bool
        Replace a folder that this function wrote before, and that nobody has changed since.

    Raises
    ------
    InputError
        If the folder exists or holds anything else, the plan isn't the one that pruned this model,
        the model's outputs aren't finite, or writing fails (a full disk, for one).
    """
    start = time.perf_counter()
    plan = getattr(report, "plan", None) if plan is None else plan
    if plan is None:
        raise InputError("save_pruned: needs the plan that was applied; give it, or a report of it")
    with writing(folder, overwrite) as path:
        fill_folder(
            model, path, plan, report=report, tokenizer=tokenizer, source=source, start=start
        )


@contextmanager
def writing(
    folder: str | os.PathLike[str], overwrite: bool = False, *, checked: bool = False
) -> Iterator[Path]:
    """Give a hidden folder to write to, which takes the place of ``folder`` in the end, at once.

    With ``checked`` the place was looked at before the job: what came there since stops nothing,
    and the hidden folder gets a name of its own, so that no work is lost.
    """
    folder = Path(folder).resolve()
    if not checked:
        check_folder(folder, overwrite)
    try:
        with beside(folder) as path:
            yield path
            put_in_place(path, folder, overwrite)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"save_pruned: can't write {folder}: {one_line(error)}; nothing was left behind, free "
            "space or choose another folder"
        ) from error


def fill_folder(
    model: nn.Module,
    path: Path,
    plan: Plan,
    *,
    report: Any = None,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    start: float,
    shards: Shards | None = None,
) -> None:
    """Write all that :func:`save_pruned` writes to a folder.

    ``start`` is when the time of saving began, by ``time.perf_counter``; ``shards`` have the
    weights already, if given.
    """
    with quiet():
        config = described(model)
    _check_plan(model, plan, config)
    with quiet(), _wearing(model, config):
        if shards is None:
            model.save_pretrained(path)
        else:
            with no_bars():
                model.save_pretrained(path, state_dict={})  # which removes shards of that name
            shards.close()
    complete_config(path)
    _save_tokenizer(tokenizer, path)
    (path / OWN_FOLDER).mkdir()
    write_vocabulary(model, tokenizer, path)
    plan.save(path / PLAN_FILE)
    _take_along(model, source, path, report, tokenizer is not None)
    write_fingerprint(model, path)
    _write_report(report, path, start)
    _open_to_readers(path)
    write_manifest(path)


def _check_plan(model: nn.Module, plan: Plan, config: Any) -> None:
    """Refuse a plan that didn't make this model, or made one that a stock loader gets wrong."""
    planned = {name: len(site.kept) for name, site in plan.sites.items()}
    found = {site.name: site.units for site in sites(model, attn_unit=plan.attn_unit)}
    for name, units in planned.items():
        if found.get(name) != units:
            raise InputError(
                f"save_pruned: the plan leaves {units} units at {name}, the model has "
                f"{found.get(name, 'no such site')}; pass the plan that pruned this model"
            )
    experts = {site.team: site.experts for site in sites(model) if site.expert is not None}
    for name, layer in plan.experts.items():
        if experts.get(name) != len(layer.kept):
            raise InputError(
                f"save_pruned: the plan leaves {len(layer.kept)} experts at {name}, the model has "
                f"{experts.get(name, 'none')}; pass the plan that pruned this model"
            )
    hidden = None if plan.hidden is None else hidden_of(model).size
    if plan.hidden is not None and hidden != len(plan.hidden.kept):
        raise InputError(
            f"save_pruned: the plan leaves {len(plan.hidden.kept)} hidden features, the model has "
            f"{hidden}; pass the plan that pruned this model"
        )
    said = config.liar
    resized = [*said.get("modules", {}).values(), *said.get("head", {}).values()]
    if said["layers"] == "unequal" and all(set(sizes) == {"bias"} for sizes in resized):
        raise InputError(
            "save_pruned: the plan removes nothing and only adds biases, which a stock loader of "
            f"{type(model).__name__} would drop silently; leave them out, or remove units too"
        )


@contextmanager
def _wearing(model: nn.Module, config: Any) -> Iterator[None]:
    """Give a model another config and its class, and no quantiser marks, for a while."""
    own = {name: model.__dict__.pop(name) for name in QUANTISER_MARKS if name in model.__dict__}
    before, kind, model.config = model.config, type(model), config
    wear(model)
    try:
        yield
    finally:
        model.config, model.__class__ = before, kind
        model.__dict__.update(own)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer; whatever its library raises, of a full disk or else, is an OSError."""
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises nothing more special
        raise OSError(f"the tokenizer can't be saved: {one_line(error)}") from error


def _take_along(model: nn.Module, source: Any, folder: Path, report: Any, tokenizer: bool) -> None:
    """Copy what else the source folder holds, and write a model card if there is a report."""
    name = os.fspath(source or model.config.name_or_path)
    found, said = source_folder(name), []
    if found is not None:
        said = carry(found, folder, sites(model)[0].d_out, tokenizer=tokenizer)
        said += leave_larger(model, found, folder)
    elif name and not os.path.isdir(name):
        said = [f"What else {name} holds could not be read, and stays behind."]
    if isinstance(getattr(report, "warnings", None), list):
        report.warnings += said
    if hasattr(report, "to_card"):
        text = report.to_card(license_of(found))
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _write_report(report: Any, folder: Path, start: float) -> None:
    """Write the report, with the seconds since ``start`` as those of saving."""
    if isinstance(report, Mapping):
        text = json.dumps(report, indent=1) + "\n"
        (folder / REPORT_JSON).write_text(text, encoding="utf-8")
    elif report is not None:
        seconds = getattr(report, "seconds", None)
        if isinstance(seconds, dict):
            seconds["save"] = time.perf_counter() - start
            if "total" in seconds:
                seconds["total"] += seconds["save"]
        report.save(folder)


def _open_to_readers(folder: Path) -> None:
    """Give every file the mode that the umask says; safetensors writes 0600."""
    mode = (folder / MARKER_FILE).stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
