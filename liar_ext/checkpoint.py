"""Save a pruned model, load it again, and prove that it is the same.

Weights are safetensors, written and read by transformers itself. What else a folder holds depends
on what the stock class of the model can build::

    equal layers      config.json says the new sizes          any loader takes the folder
    unequal layers    config.json says the dense sizes, and   load_pruned takes it; a stock loader
                      per_layer_config the real ones          stops at the sizes
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

import torch
from safetensors import SafetensorError
from torch import nn

from liar_ext.arch import skeleton
from liar_ext.errors import InputError
from liar_ext.plan import Plan
from liar_ext.probe import compare_probe, read_probe, write_probe
from liar_ext.stock import LAYER_FIELDS, equal_config, shapes_of, write_layer_sizes
from liar_ext.surgery import apply_plan

PLAN_FILE = "liar_plan.json"
MARK_VERSION = 1
# What transformers leaves on a model that it read from GGUF, and what forbids to save it.
_QUANTISER_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


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


def load_pruned(folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Load a model that :func:`save_pruned` wrote, with equal or unequal layers.

    Transformers' own loader is in charge; for unequal layers it builds the stock class, to which
    the plan of the folder is applied before the weights come in.

    Parameters
    ----------
    folder : path
        What :func:`save_pruned` wrote.
    **kwargs
        For ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    InputError
        If the folder isn't one of ours, or lacks weights.
    """
    folder = Path(folder)
    fields = _read_config(folder)
    stock = _stock_class(fields)
    if fields["liar"]["layers"] == "equal":
        loader = stock
    else:
        from transformers import CONFIG_MAPPING

        loader = _planned_class(stock, Plan.load(folder / PLAN_FILE))
        kwargs["config"] = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model, info = loader.from_pretrained(folder, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise InputError(
            f"load_pruned: {folder} lacks {', '.join(sorted(info['missing_keys'])[:4])}; "
            "copy the folder again"
        )
    # Only __init__ differed. As an object of the stock class the model can be pickled and saved.
    model.__class__ = stock
    return model


def verify_pruned(folder: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """Reload a folder by every loader that it claims, and compare with the model that was saved.

    The output on the fixed input of the folder's probe agrees if
    ``max |y − ŷ| ≤ √ε · max |y|``, ε of the model's dtype: half of its digits.

    Parameters
    ----------
    folder : path
        What :func:`save_pruned` wrote.
    device : str
        Where to run; another device than the saved model's computes slightly other numbers.

    Returns
    -------
    dict
        ``agrees`` (all of them), ``layers`` ("equal" or "unequal"), ``dtype``, ``params``,
        ``tolerance``, and ``loaders``: by name ``max_abs_difference``, ``params``, ``agrees``.

    Raises
    ------
    InputError
        If the folder isn't one of ours.
    """
    folder = Path(folder)
    fields = _read_config(folder)
    probe = read_probe(folder)
    loaders = {"liar_ext.load_pruned": load_pruned}
    if fields["liar"]["layers"] == "equal":
        stock = _stock_class(fields)
        loaders[f"transformers.{stock.__name__}.from_pretrained"] = stock.from_pretrained
    results = {}
    for name, loader in loaders.items():
        model = loader(folder, dtype=probe.dtype, attn_implementation=probe.attention)
        results[name] = compare_probe(model.to(device).eval(), probe)
        del model
    return {
        "folder": str(folder),
        "agrees": all(result["agrees"] for result in results.values()),
        "layers": fields["liar"]["layers"],
        "dtype": str(probe.dtype).removeprefix("torch."),
        "params": probe.params,
        "tolerance": probe.tolerance,
        "loaders": results,
    }


def load_model(
    name: str | os.PathLike[str], dtype: str | torch.dtype = "float32", device: str = "cpu"
) -> tuple[nn.Module, Any]:
    """Load a model to prune or to measure, and its tokenizer.

    Parameters
    ----------
    name : path or str
        A folder, pruned or not; a hub id; or a GGUF file, which is dequantised.
    dtype : str or torch.dtype
        Of the weights.
    device : str
        Where the model goes.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode; of the class that its config names.
    tokenizer
        None where there is none, as for vision models.

    Raises
    ------
    InputError
        If it can't be loaded.
    """
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    path = Path(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if (path.is_absolute() or path.suffix == ".gguf") and not path.exists():
        raise InputError(
            f"load_model: {name} doesn't exist; give a folder, a hub id or a GGUF file"
        )
    try:
        if path.suffix == ".gguf":
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype
            )
            _drop_quantisation(model)
        elif (path / PLAN_FILE).exists():
            model = load_pruned(path, dtype=dtype)
        else:
            named = (AutoConfig.from_pretrained(name).architectures or [""])[0]
            model_class = getattr(transformers, named, AutoModel)
            model = model_class.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"load_model: can't load {name}: {error}; give a folder, a hub id or a GGUF file"
        ) from error
    return model.to(device).eval(), _load_tokenizer(path, name, model.config)


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
    config.__dict__.pop("quantization_config", None)
    equal = equal_config(model, config)
    layers = "unequal" if equal is None else "equal"
    if equal is None:
        _check_plan(model, config, plan)
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
    own = {name: model.__dict__.pop(name) for name in _QUANTISER_MARKS if name in model.__dict__}
    dense, model.config = model.config, config
    try:
        yield
    finally:
        model.config = dense
        model.__dict__.update(own)


def _drop_quantisation(model: nn.Module) -> None:
    """Make an ordinary model of one that was dequantised while it was read."""
    model.config.__dict__.pop("quantization_config", None)
    for name in _QUANTISER_MARKS:
        model.__dict__.pop(name, None)


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


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config, without the sizes of its layers."""

    def without_layers(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in LAYER_FIELDS}

    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        fields = json.loads(text, object_hook=without_layers)
    except (OSError, ValueError) as error:
        raise InputError(f"load_pruned: {folder} holds no readable config.json: {error}") from error
    if "liar" not in fields:
        raise InputError(
            f"load_pruned: {folder} isn't a pruned model; load it with plain transformers"
        )
    if fields["liar"]["version"] != MARK_VERSION:
        raise InputError(
            f"load_pruned: {folder} has version {fields['liar']['version']}, not {MARK_VERSION}; "
            "read it with the liar_ext that wrote it"
        )
    return fields


def _stock_class(fields: Mapping[str, Any]) -> Any:
    """Return the class of transformers that a config names."""
    import transformers

    name = (fields.get("architectures") or [None])[0]
    stock = getattr(transformers, name or "", None)
    if stock is None:
        raise InputError(f"load_pruned: transformers has no class {name!r}; update transformers")
    return stock


def _planned_class(stock: Any, plan: Plan) -> Any:
    """Return a class that builds the stock model and applies a plan to it.

    It goes by the name of the stock class, by which transformers finds how to rename the weights
    of older checkpoints.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        apply_plan(self, plan)

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})


def _load_tokenizer(path: Path, name: str | os.PathLike[str], config: Any) -> Any | None:
    """Return the tokenizer of a model, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(name, config=config)
    except (OSError, ValueError, KeyError):
        return None
