"""Load a pruned model, or any other.

Transformers' own loaders read the weights. No code of a folder is run here, and what its files
claim is looked over first: :mod:`liar_ext.checkpoint.inspection`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from liar_ext.checkpoint import folder as saved
from liar_ext.checkpoint.inspection import (
    CLASS_NAME,
    Folder,
    inspect_folder,
    reach_hub,
    read_config,
    read_marked_config,
    reading,
    stock_class,
)
from liar_ext.checkpoint.readers import load_tokenizer, only_file
from liar_ext.checkpoint.stock_config import dense_config, describe
from liar_ext.models.liar_loader import pruned_class, resize
from liar_ext.models.plan import Plan
from liar_ext.models.registry import config_parts, counts_layers, skeleton
from liar_ext.models.slicing import apply_plan
from liar_ext.system.errors import InputError, one_line, refusing
from liar_ext.system.files import read_json
from liar_ext.system.progress import obedient_bar, quiet

SAFELY = {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
# Transformers 5.25 takes kernels of the hub by default: code of others, and other bits.
PLAINLY = {"use_kernels": False}

# More arguments that would have transformers run code of the folder, or read other files of it.
REFUSED_ARGUMENTS = ("custom_generate", "adapter_kwargs")


def load_pruned(folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Load a model that :func:`liar_ext.save_pruned` wrote, with equal or unequal layers.

    Parameters
    ----------
    folder : path
        What :func:`liar_ext.save_pruned` wrote.
    **kwargs
        For ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...; a
        ``config``, if one is given, must be that of the folder, with other options.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    InputError
        If the folder isn't one of ours, is damaged, or its weights aren't those of its config and
        plan. None of its code is ever run.
    """
    folder = Path(folder)
    fields = read_marked_config(folder)
    found = inspect_folder(folder, "load_pruned")
    stock = stock_class(fields, "load_pruned")
    if "quantization_config" in fields:
        raise InputError(
            f"load_pruned: {folder} is quantised; load it with plain transformers, or load the one "
            "that it was made from"
        )
    plan, mark = None, fields["liar"]
    if (mark["version"], mark["layers"]) == (saved.OLD_MARK_VERSION, "unequal"):
        plan = read_plan(folder / saved.OLD_PLAN_FILE, "load_pruned")
        with reading(folder, "load_pruned"):
            given = kwargs.get("config") or stock.config_class.from_dict(fields)
            kwargs["config"] = dense_config(given)
            kwargs["config"].liar = mark
    kwargs = {name: value for name, value in kwargs.items() if name not in REFUSED_ARGUMENTS}
    # Of newer folders the config says it all, but a damaged one is told of.
    plans = [folder / name for name in (saved.PLAN_FILE, saved.OLD_PLAN_FILE)]
    known = [read_plan(path, "load_pruned") for path in plans if os.path.lexists(path)]
    model = read_weights(stock, found, "load_pruned", plan, strict=True, **kwargs)
    if known:
        model.liar_plan = known[0]  # with which a further pruning composes
    return model


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
        Where the model goes; ``"auto"`` spreads its blocks over all devices that there are.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode; of the class that its config names.
    tokenizer
        None where there is none, as for vision models.

    Raises
    ------
    InputError
        If it can't be loaded, or there is no such device.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(
            f"load_model: the model must be a folder, a hub id or a GGUF file, got {name!r}"
        )
    spread, dtype = placement(device), dtype_of(dtype)
    with refusing(f"load_model: {os.fspath(name)!r} can't be read", "", OSError, ValueError):
        path = Path(name)
        there = path.exists()
    if (path.is_absolute() or path.suffix == ".gguf") and not there:
        raise InputError(
            f"load_model: {name} doesn't exist; give a folder, a hub id or a GGUF file"
        )
    if path.suffix == ".gguf":
        model = _read_gguf(path, dtype=dtype, **spread)
    elif path.is_dir() and "liar" in read_config(path, "load_model"):
        model = load_pruned(path, dtype=dtype, **spread)
    else:
        model = read_dense(name, dtype=dtype, **spread)
    model = model if spread else model.to(device)
    return model.eval(), load_tokenizer(name, model)


def dtype_of(given: str | torch.dtype) -> torch.dtype:
    """Return a data type by its name, or as it is."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"load_model: dtype must be one of torch, such as float32, got {given!r}")
    return dtype


def placement(device: str) -> dict[str, str]:
    """Return what ``from_pretrained`` needs for a device: nothing, unless it spreads the model."""
    if device == "auto":
        return {"device_map": "auto"}
    what = f"load_model: device must be one that torch can use here, or auto, got {device!r}"
    with refusing(what, "", RuntimeError, AssertionError):  # the second: a torch built without it
        torch.empty(0, device=device)
    return {}


def read_plan(path: Path, operation: str) -> Plan:
    """Return a plan, read with the bounds of any other JSON."""
    fields = read_json(path, operation)
    try:
        return Plan.from_json(json.dumps(fields))
    except InputError as error:
        raise InputError(f"{operation}: {path}: {one_line(error)}") from error


def read_dense(name: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Load an ordinary model by the class that its config names."""
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir():
        found = inspect_folder(path, "load_model")
        stock = stock_class(found.config, "load_model")
        bare = bare_class(found, stock)
        model = read_weights(bare or stock, found, "load_model", strict=False, **kwargs)
        if bare is not None:
            model.liar_notes = [
                f"The model was loaded as {bare.__name__}: config.json names {stock.__name__}, "
                "and the weights are those of the model without its head."
            ]
        return model
    reach_hub(name)
    try:
        with quiet(), reading(name, "load_model"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            stock = stock_class(config.to_dict(), "load_model")
            model, info = stock.from_pretrained(name, **PLAINLY, **SAFELY, **kwargs)
    except InputError as error:
        raise InputError(
            f"load_model: there is no folder {path} here; the hub says: {one_line(error, 160)}"
        ) from error
    check_keys(info, name, "load_model", strict=False)
    return settled(model)


def _read_gguf(path: Path, **kwargs: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with obedient_bar(), quiet(), reading(path, "load_model"), only_file(path) as found:
        model, info = AutoModelForCausalLM.from_pretrained(
            **found, **PLAINLY, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    check_keys(info, path, "load_model", strict=False)
    model.config._name_or_path = os.fspath(path.parent)
    model.config.__dict__.pop("quantization_config", None)
    for name in saved.QUANTISER_MARKS:
        model.__dict__.pop(name, None)
    return model


def read_weights(
    stock: Any,
    found: Folder,
    operation: str,
    plan: Plan | None = None,
    *,
    strict: bool,
    **kwargs: Any,
) -> nn.Module:
    """Load a folder by its stock class; refuse weights that lack, or add, any of the model's."""
    is_packed = "quantization_config" in found.config
    numel = None if is_packed else sum(map(prod, found.tensors.values()))
    loader = _checked_class(stock, plan, numel, f"{operation}: {found.path}")
    with quiet(), reading(found.path, operation):
        # Weights of other sizes are refused below, by name.
        given = PLAINLY | kwargs | SAFELY | {"ignore_mismatched_sizes": True}
        if CLASS_NAME in found.config:  # whose loader runs no code, and calls the type otherwise
            del given["trust_remote_code"], given["use_kernels"]
            if (dtype := given.pop("dtype", "auto")) == "auto":
                with safe_open(min(found.path.glob("*.safetensors")), framework="pt") as file:
                    dtype = file.get_tensor(next(iter(file.keys()))).dtype
            given["torch_dtype"] = getattr(torch, str(dtype).removeprefix("torch."))
        model, info = loader.from_pretrained(found.path, **given)
    model.__class__ = stock  # only __init__ differed, and no module has that class
    if not strict and "add_pooling_layer" in inspect.signature(stock.__init__).parameters:
        # Many encoders' folders lack the pooler. A sentence encoder is read by its hidden states.
        pooler = {name for name in info["missing_keys"] if name.startswith("pooler.")}
        for name in pooler:
            model.get_parameter(name).data.zero_()
        info["missing_keys"] = set(info["missing_keys"]) - pooler
    check_keys(info, found.path, operation, strict)
    if hasattr(model.config, "liar"):
        said = _sizes_said(model.config)
        with reading(found.path, operation):
            describe(model)
        if said[0] and not _agree(said, _sizes_said(model.config)):
            raise InputError(
                f"{operation}: config.json of {found.path} contradicts itself: the sizes of its "
                "modules aren't those of its layers and heads; copy the folder again"
            )
    return settled(model)


def settled(model: nn.Module) -> nn.Module:
    """Return a model that can run: the kernel for experts takes no float64."""
    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _sizes_said(config: Any) -> tuple[dict[tuple[str, str], tuple[int | None, ...]], list[Any]]:
    said = config.liar if isinstance(config.liar, Mapping) else {}
    shapes = {
        (path, name): tuple(size)
        for part in ("modules", "head")
        for path, sizes in said.get(part, {}).items()
        for name, size in sizes.items()
        if isinstance(size, list)
    }
    # Of a config that counts no layers, earlier folders have some.
    parts = filter(counts_layers, config_parts(config))
    spec = [part.__dict__.get("_heterogeneity_spec") for part in parts]
    return shapes, [each and each.per_layer_overrides for each in spec]


def _agree(one: tuple[dict, list], other: tuple[dict, list]) -> bool:
    """Tell whether what two configs say agrees; null, for a whole dimension, does with any size."""
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(
            len(size) == len(other[0][key])
            and all(n == m or None in (n, m) for n, m in zip(size, other[0][key], strict=True))
            for key, size in one[0].items()
        )
    )


def check_keys(info: Mapping[str, Any], path: Any, operation: str, strict: bool) -> None:
    """Refuse missing weights, and weights of layers that the model hasn't.

    A dense folder may hold a head that the class doesn't read (``strict=False``).
    """
    wrong = [
        f"has {name} with shape {tuple(theirs)}, its config or plan says {tuple(ours)}"
        for name, theirs, ours in sorted(info["mismatched_keys"])
    ]
    wrong = wrong or [f"lacks {name}" for name in sorted(info["missing_keys"])]
    wrong = wrong or [
        f"has weights that its config, or plan, doesn't: {name}"
        for name in sorted(info["unexpected_keys"])
        if strict or re.search(r"\.\d+\..*(weight|bias)$", name)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{operation}: {path} {wrong[0]}{more}; copy it again")


def bare_class(found: Folder, stock: Any) -> Any | None:
    """Return the class without a head, if the weights are those of it; None otherwise.

    Of folders of sentence-transformers they are, whatever their config names. In any other folder
    no weight of the head may be there, and none that the bare model lacks.
    """
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    bare = MODEL_MAPPING.get(stock.config_class, None)
    if bare is stock or not isinstance(bare, type):
        return None
    if (found.path / saved.MODULES_FILE).is_file():
        return bare
    with reading(found.path, "load_model"):
        # Of the file, in which transformers writes an infinite number in a way of its own.
        config = CONFIG_MAPPING[found.config["model_type"]].from_pretrained(found.path)
        model, without = (skeleton(each, config) for each in (stock, bare))
    prefix, tied = f"{stock.base_model_prefix}.", set(model.all_tied_weights_keys)
    head = {name for name in model.state_dict() if not name.startswith(prefix)} - tied
    there = {name.removeprefix(prefix) for name in found.tensors}
    more = {name for name in there - set(without.state_dict()) if "position_ids" not in name}
    return bare if head and head.isdisjoint(there) and not more else None


def _checked_class(stock: Any, plan: Plan | None, numel: int | None, what: str) -> Any:
    """Return a class that builds the stock model, with the sizes of its config or of a plan.

    It is built on the meta device, and takes no memory if it wants far more than the files hold. By
    the name of the stock class transformers finds how to rename the weights of older checkpoints.
    """
    said = hasattr(stock, "register_to_config")  # of diffusers: its fields are arguments
    base = pruned_class(stock) if said else stock

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        resize(self)
        if plan is not None:
            apply_plan(self, plan)
        tied = getattr(self, "all_tied_weights_keys", {})  # none of diffusers
        claimed = sum(each.numel() for name, each in self.named_parameters() if name not in tied)
        if numel is not None and claimed > 2 * numel:
            raise InputError(
                f"{what} has {numel:,} numbers in its weights, and its config claims {claimed:,}; "
                "copy the folder again"
            )

    if said:
        build.__signature__ = inspect.signature(base.__init__)
    return type(stock.__name__, (base,), {"__init__": build, "__module__": stock.__module__})
