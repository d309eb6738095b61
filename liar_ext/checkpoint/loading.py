"""Load a pruned model, or any other, and prove that a pruned one is the one that was saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from liar_ext.checkpoint.fingerprint import compare_probe, read_probe
from liar_ext.checkpoint.saving import MARK_VERSION, PLAN_FILE, QUANTISER_MARKS
from liar_ext.checkpoint.stock_config import LAYER_FIELDS
from liar_ext.errors import InputError
from liar_ext.plan import Plan
from liar_ext.surgery.units import apply_plan

# Arguments of from_pretrained that say where to find a repository.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def load_pruned(folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Load a model that :func:`liar_ext.save_pruned` wrote, with equal or unequal layers.

    Transformers' own loader is in charge; for unequal layers it builds the stock class, to which
    the plan of the folder is applied before the weights come in.

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
        If the folder isn't one of ours, or lacks weights.
    """
    folder = Path(folder)
    fields = _read_config(folder)
    loader = stock = _stock_class(fields)
    if fields["liar"]["layers"] == "unequal":
        loader = _planned_class(stock, Plan.load(folder / PLAN_FILE))
        kwargs["config"] = _dense_config(fields, kwargs.get("config"))
    model, info = loader.from_pretrained(folder, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise InputError(
            f"load_pruned: {folder} lacks {', '.join(sorted(info['missing_keys'])[:4])}; "
            "copy the folder again"
        )
    # Only __init__ differed. As an object of the stock class the model can be pickled and saved.
    model.__class__ = stock
    return model


class PrunedModel:
    """The loader that ``auto_map`` names in the config of a folder with unequal layers.

    With ``trust_remote_code=True`` the auto classes of transformers call it as if it were a model
    class; what they return is an object of the stock class, ``generate`` and all.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the folder holds the code already."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *args: Any, **kwargs: Any) -> nn.Module:
        """Load a folder, or a repository of the hub, as :func:`load_pruned` does."""
        if not Path(name).is_dir():
            from huggingface_hub import snapshot_download

            own = [key for key in HUB_ARGUMENTS if key in kwargs]
            name = snapshot_download(os.fspath(name), **{key: kwargs.pop(key) for key in own})
        return load_pruned(name, **kwargs)


def verify_pruned(folder: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """Reload a folder by every loader that it claims, and compare with the model that was saved.

    The output on the fixed input of the folder's probe agrees if
    ``max |y − ŷ| ≤ √ε · max |y|``, ε of the model's dtype: half of its digits.

    Parameters
    ----------
    folder : path
        What :func:`liar_ext.save_pruned` wrote.
    device : str
        Where to run, as for :func:`load_model`; another device than the saved model's computes
        slightly other numbers.

    Returns
    -------
    dict
        ``agrees`` (all of them), ``layers`` ("equal" or "unequal"), ``dtype``, ``params``,
        ``tolerance``, and ``loaders``: by name ``max_abs_difference``, ``params``, ``agrees``.

    Raises
    ------
    InputError
        If the folder isn't one of ours, or there is no such device.

    Notes
    -----
    Where the code of the folder is trusted, transformers copies it to its cache of modules.
    """
    import transformers

    spread = _placement(device)
    folder = Path(folder)
    fields = _read_config(folder)
    probe = read_probe(folder)
    loaders = {"liar_ext.load_pruned": load_pruned}
    if fields["liar"]["layers"] == "equal":
        stock = _stock_class(fields)
        loaders[f"transformers.{stock.__name__}.from_pretrained"] = stock.from_pretrained
    for name in sorted(fields.get("auto_map", {}))[:1]:
        loaders[f"transformers.{name}.from_pretrained(trust_remote_code=True)"] = partial(
            getattr(transformers, name).from_pretrained, trust_remote_code=True
        )
    results = {}
    for name, loader in loaders.items():
        model = loader(folder, dtype=probe.dtype, attn_implementation=probe.attention, **spread)
        results[name] = compare_probe((model if spread else model.to(device)).eval(), probe)
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
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    spread = _placement(device)
    path = Path(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if (path.is_absolute() or path.suffix == ".gguf") and not path.exists():
        raise InputError(
            f"load_model: {name} doesn't exist; give a folder, a hub id or a GGUF file"
        )
    try:
        if path.suffix == ".gguf":
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, **spread
            )
            _drop_quantisation(model)
        elif (path / PLAN_FILE).exists():
            model = load_pruned(path, dtype=dtype, **spread)
        else:
            named = (AutoConfig.from_pretrained(name).architectures or [""])[0]
            model_class = getattr(transformers, named, AutoModel)
            model = model_class.from_pretrained(name, dtype=dtype, **spread)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"load_model: can't load {name}: {error}; give a folder, a hub id or a GGUF file"
        ) from error
    model = model if spread else model.to(device)
    return model.eval(), _load_tokenizer(path, name, model.config)


def _placement(device: str) -> dict[str, str]:
    """Return what ``from_pretrained`` needs for a device: nothing, unless it spreads the model."""
    if device == "auto":
        return {"device_map": "auto"}
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: a torch built without it
        raise InputError(
            f"load_model: device must be one that torch can use here, or auto, got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return {}


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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


def _dense_config(fields: Mapping[str, Any], given: Any | None = None) -> Any:
    """Return the config that the dense model is built from: without the sizes of its layers."""
    from transformers import CONFIG_MAPPING

    def without_layers(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: without_layers(v) for key, v in value.items() if key not in LAYER_FIELDS}

    fields = fields if given is None else given.to_dict()
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(without_layers(fields))
    config.__dict__.pop("auto_map", None)  # the loaded model is an ordinary one
    if given is not None:
        config._attn_implementation = given._attn_implementation
    return config


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


def _drop_quantisation(model: nn.Module) -> None:
    """Make an ordinary model of one that was dequantised while it was read."""
    model.config.__dict__.pop("quantization_config", None)
    for name in QUANTISER_MARKS:
        model.__dict__.pop(name, None)


def _load_tokenizer(path: Path, name: str | os.PathLike[str], config: Any) -> Any | None:
    """Return the tokenizer of a model, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(name, config=config)
    except (OSError, ValueError, KeyError):
        return None
