"""Save a pruned model to a folder, whole or not at all.

Weights are safetensors, written and read by transformers itself. What else a folder holds depends
on what the stock class of the model can build::

    equal layers      config.json says the new sizes          any loader takes the folder
    unequal layers    config.json says the dense sizes, and   load_pruned takes it, and so does a
                      per_layer_config the real ones;         stock loader that may run the code of
                      liar_loader.py                          the folder; else it stops at the sizes
    always            liar_plan.json, liar_probe.safetensors  for load_pruned and verify_pruned
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from torch import nn

from liar_ext.checkpoint.fingerprint import write_probe
from liar_ext.checkpoint.stock_config import (
    auto_classes,
    equal_config,
    shapes_of,
    write_layer_sizes,
)
from liar_ext.errors import InputError
from liar_ext.models.sites import skeleton
from liar_ext.plan import Plan
from liar_ext.surgery.units import apply_plan

PLAN_FILE = "liar_plan.json"
MARK_VERSION = 1
# The code that from_pretrained(folder, trust_remote_code=True) runs, named by auto_map.
LOADER_FILE = "liar_loader.py"
LOADER_CODE = '''"""Builds the layers that liar_plan.json says; config.json names it."""

from liar_ext.checkpoint import PrunedModel

__all__ = ["PrunedModel"]
'''
# What transformers leaves on a model that it read from GGUF, and what forbids to save it.
QUANTISER_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plan: Plan,
    *,
    report: Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a pruned model to a folder: weights, config, tokenizer, plan, report and probe.

    All is written beside the folder and renamed at the end, so that a failure leaves neither half
    a folder nor a lost one. The model itself stays as it is. A model that was read from GGUF is
    saved as an ordinary one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model after :func:`liar_ext.apply_plan`.
    folder : path
        Where to write; its parents are made.
    plan : Plan
        The plan that was applied.
    report : Report or mapping, optional
        Anything with ``save(folder)``, or a mapping that is written as ``liar_report.json``.
    tokenizer : optional
        Tokenizer or processor to save, with its chat template.
    overwrite : bool
        Replace a folder that this function wrote before.

    Raises
    ------
    InputError
        If the folder exists, the plan isn't the one that pruned this model, or writing fails (a
        full disk, for one).
    """
    folder = Path(folder).resolve()
    check_folder(folder, overwrite)
    config, layers = _describe(model, plan)
    beside = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        beside.mkdir(parents=True)
        with _wearing(model, config):
            model.save_pretrained(beside)
        if layers == "unequal":
            write_layer_sizes(model, beside)
            (beside / LOADER_FILE).write_text(LOADER_CODE, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        plan.save(beside / PLAN_FILE)
        write_probe(model, beside)
        _write_report(report, beside)
        _replace(folder, beside)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"save_pruned: can't write {folder}: {error}; nothing was left behind, free space or "
            "choose another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a folder that can't be written to.

    Raises
    ------
    InputError
        If the folder exists and ``overwrite`` is false, or holds something else than a pruned
        model, which is never overwritten.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise InputError(f"save_pruned: {folder} exists; choose another folder or overwrite it")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / PLAN_FILE).exists()):
        raise InputError(
            f"save_pruned: {folder} isn't a pruned model, so it isn't overwritten; choose another "
            "folder"
        )


def _describe(model: nn.Module, plan: Plan) -> tuple[Any, str]:
    """Return the config to save, and whether it alone describes the layers: "equal" if so."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "auto_map"):
        config.__dict__.pop(name, None)
    equal = equal_config(model, config)
    layers = "unequal" if equal is None else "equal"
    if equal is None:
        _check_plan(model, config, plan)
        loader = f"{Path(LOADER_FILE).stem}.PrunedModel"
        config.auto_map = dict.fromkeys(auto_classes(model), loader)
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


def _write_report(report: Any, folder: Path) -> None:
    if isinstance(report, Mapping):
        text = json.dumps(report, indent=1) + "\n"
        (folder / "liar_report.json").write_text(text, encoding="utf-8")
    elif report is not None:
        report.save(folder)


def _replace(folder: Path, beside: Path) -> None:
    """Rename ``beside`` to ``folder``; a folder that is in the way goes last."""
    if not folder.exists():
        beside.rename(folder)
        return
    old = beside.with_name(beside.name + ".old")
    folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
