"""Save a pruned model to a folder, whole or not at all.

Weights are safetensors, written and read by transformers itself. What else a folder holds depends
on what the stock class of the model can build::

    equal layers      config.json says the new sizes          any loader takes the folder
    unequal layers    config.json says the dense sizes, and   load_pruned takes it, and so does a
                      per_layer_config the real ones;         stock loader that may run the code of
                      liar_loader.py                          the folder; else it stops at the sizes
    always            liar_plan.json                          for load_pruned
                      liar/fingerprint.safetensors            for verify_pruned
                      liar_manifest.json                      what may be overwritten one day
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from liar_ext.checkpoint.fingerprint import write_fingerprint
from liar_ext.checkpoint.manifest import write_manifest
from liar_ext.checkpoint.names import (
    LOADER_CLASS,
    LOADER_CODE,
    LOADER_FILE,
    MARK_VERSION,
    MARKER_FILE,
    PLAN_FILE,
    QUANTISER_MARKS,
)
from liar_ext.checkpoint.placing import beside, check_folder, put_in_place
from liar_ext.checkpoint.stock_config import (
    auto_classes,
    equal_config,
    shapes_of,
    write_layer_sizes,
)
from liar_ext.errors import InputError, one_line
from liar_ext.models.sites import skeleton
from liar_ext.plan import Plan
from liar_ext.surgery.units import apply_plan

__all__ = ["PLAN_FILE", "check_folder", "save_pruned"]


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plan: Plan,
    *,
    report: Any = None,
    tokenizer: Any = None,
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
    plan : Plan
        The plan that was applied.
    report : Report or mapping, optional
        Anything with ``save(folder)``, or a mapping that is written as ``liar_report.json``. It is
        written last. If it has ``seconds``, a dict, those of saving are put there first as
        ``save``, and added to ``total`` if that is there.
    tokenizer : optional
        Tokenizer or processor to save, with its chat template.
    overwrite : bool
        Replace a folder that this function wrote before, and that nobody has changed since.

    Raises
    ------
    InputError
        If the folder exists or holds anything else, the plan isn't the one that pruned this model,
        the model's outputs aren't finite, or writing fails (a full disk, for one).
    """
    start = time.perf_counter()
    folder = Path(folder).resolve()
    check_folder(folder, overwrite)
    config, layers = _describe(model, plan)
    try:
        with beside(folder) as path:
            with _wearing(model, config):
                model.save_pretrained(path)
            if layers == "unequal":
                write_layer_sizes(model, path)
                (path / LOADER_FILE).write_text(LOADER_CODE, encoding="utf-8")
            _save_tokenizer(tokenizer, path)
            plan.save(path / PLAN_FILE)
            write_fingerprint(model, path)
            _write_report(report, path, start)
            _open_to_readers(path)
            write_manifest(path)
            put_in_place(path, folder, overwrite)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"save_pruned: can't write {folder}: {one_line(error)}; nothing was left behind, free "
            "space or choose another folder"
        ) from error


def _describe(model: nn.Module, plan: Plan) -> tuple[Any, str]:
    """Return the config to save, and whether it alone describes the layers: "equal" if so."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "auto_map"):
        config.__dict__.pop(name, None)
    equal = equal_config(model, config)
    layers = "unequal" if equal is None else "equal"
    if equal is None:
        _check_plan(model, config, plan)
        config.auto_map = dict.fromkeys(auto_classes(model), LOADER_CLASS)
    config = equal or config
    config.liar = {"version": MARK_VERSION, "layers": layers}
    return config, layers


def _check_plan(model: nn.Module, config: Any, plan: Plan) -> None:
    """Refuse a plan that doesn't make this model of a dense one, or that a stock loader misses."""
    dense = skeleton(type(model), config)
    before, ours = shapes_of(dense), shapes_of(model)
    apply_plan(dense, plan)
    planned = shapes_of(dense)
    if planned != ours:
        name = next(name for name in planned | ours if planned.get(name) != ours.get(name))
        raise InputError(
            f"save_pruned: the plan gives {name} the shape {planned.get(name)}, the model has "
            f"{ours.get(name)}; pass the plan that pruned this model"
        )
    if all(ours[name] == shape for name, shape in before.items()):
        raise InputError(
            "save_pruned: the plan removes nothing and only adds biases, which a stock loader of "
            f"{type(model).__name__} would drop silently; leave them out, or remove units too"
        )


@contextmanager
def _wearing(model: nn.Module, config: Any) -> Iterator[None]:
    """Give a model another config, and no quantiser marks, for a while."""
    own = {name: model.__dict__.pop(name) for name in QUANTISER_MARKS if name in model.__dict__}
    dense, model.config = model.config, config
    try:
        yield
    finally:
        model.config = dense
        model.__dict__.update(own)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer; whatever its library raises, of a full disk or else, is an OSError."""
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises nothing more special
        raise OSError(f"the tokenizer can't be saved: {one_line(error)}") from error


def _write_report(report: Any, folder: Path, start: float) -> None:
    """Write the report, with the seconds since ``start`` as those of saving."""
    if isinstance(report, Mapping):
        text = json.dumps(report, indent=1) + "\n"
        (folder / "liar_report.json").write_text(text, encoding="utf-8")
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
