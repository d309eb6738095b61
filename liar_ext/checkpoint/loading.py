"""Load a pruned model, or any other.

Transformers' own loaders read the weights. No code of a folder is run here, and what its files
claim is looked over first: :mod:`liar_ext.checkpoint.inspection`. After :func:`register` they build
the sizes in a config; without it a folder with layers of unequal sizes needs
``trust_remote_code=True``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from liar_ext.calibration.image_text import ImageTextReader, holds_images
from liar_ext.calibration.media import AUDIO, IMAGES_WITH_TEXT, INPUTS, Reader
from liar_ext.checkpoint import folder as saved
from liar_ext.checkpoint.carrying import source_folder
from liar_ext.checkpoint.inspection import inspect_folder, read_config, read_json
from liar_ext.checkpoint.reading import (
    PLAINLY,
    SAFELY,
    bare_class,
    check_keys,
    read_marked_config,
    read_weights,
    reading,
    settled,
    stock_class,
)
from liar_ext.checkpoint.sentence import longest_text
from liar_ext.checkpoint.stock_config import dense_config, wear
from liar_ext.models.liar_loader import resize
from liar_ext.models.plan import Plan
from liar_ext.models.running import DECODER_IDS, inputs_read, known_tokens, predicts_next_token
from liar_ext.system.errors import InputError, asking_hub, one_line, refusing
from liar_ext.system.progress import obedient_bar, quiet

# Arguments that would have transformers run code of the folder, or read other files of it.
REFUSED_ARGUMENTS = (
    *("trust_remote_code", "use_safetensors", "custom_generate", "adapter_kwargs"),
    "ignore_mismatched_sizes",
)
# Transformers has no place to register sizes at, so post_init of the models that it has here, which
# ends the building of each, looks for them first.
MODELING = "transformers.modeling_utils"


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


def reach_hub(name: str | os.PathLike[str]) -> None:
    """Raise InputError unless there is a local copy of a model, or the hub answers.

    It is asked once: a download asks six times, which takes 23 seconds where there is no network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    file = os.fspath(name), "config.json"
    with asking_hub(f"load_model: there is no folder {name} here; the hub can't be reached"):
        if not isinstance(try_to_load_from_cache(*file), str):
            get_hf_file_metadata(hf_hub_url(*file))


def _read_gguf(path: Path, **kwargs: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with obedient_bar(), quiet(), reading(path, "load_model"), _alone(path) as found:
        model, info = AutoModelForCausalLM.from_pretrained(
            **found, **PLAINLY, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    check_keys(info, path, "load_model", strict=False)
    model.config._name_or_path = os.fspath(path.parent)
    model.config.__dict__.pop("quantization_config", None)
    for name in saved.QUANTISER_MARKS:
        model.__dict__.pop(name, None)
    return model


@contextmanager
def _alone(path: Path) -> Iterator[dict[str, Any]]:
    """Give the arguments that read a GGUF file and nothing beside it: no code, no adapter."""
    with TemporaryDirectory() as room:
        Path(room, "model.gguf").symlink_to(path.resolve())
        given = {"pretrained_model_name_or_path": room, "gguf_file": "model.gguf"}
        yield given | {"trust_remote_code": False}


def load_tokenizer(name: str | os.PathLike[str], model: nn.Module) -> Any | None:
    """Return the tokenizer of a model, or None where there is none.

    Its ``liar_longest`` is the ``max_seq_length`` of sentence-transformers, if there is one.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    if path.suffix == ".gguf":
        with reading(path, "load_model"), _alone(path) as found:
            return AutoTokenizer.from_pretrained(**found)
    if model.main_input_name != "input_ids":
        return None  # a vision model, which has a processor
    if path.is_dir():
        there = [file for file in saved.TOKENIZER_FILES if (path / file).exists()]
        if not there:
            return None
        for file in there:
            if file.endswith("_config.json"):
                read_json(path / file, "load_model")
    with reading(f"the tokenizer of {name}", "load_model"):
        given = {"config": model.config, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(name, **given)
        special = set(tokenizer.all_special_tokens)  # which may have come later
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special |= {token.content for token in added if token.special}
        known = tokenizer.get_vocab().items()
        largest = max((index for token, index in known if token not in special), default=-1)
    rows = known_tokens(model, inputs_read(model)["input_ids"])
    if largest >= rows:
        raise InputError(
            f"load_model: the tokenizer of {name} has tokens up to {largest}, the model knows "
            f"{rows}; put the tokenizer of this model there"
        )
    folder = None if predicts_next_token(model) else source_folder(os.fspath(name))
    if folder is not None and (longest := longest_text(folder)) is not None:
        tokenizer.liar_longest = longest
    return tokenizer


def kind_of(name: str, sources: Iterable[str | None] = ()) -> str | None:
    """Return what a model reads by its config: "audio", "images", or None for text.

    One that reads images and text is given "images with text" where any of the ``sources`` holds
    images. What can't be told is text: the loader says what is wrong.
    """
    path = Path(name)
    try:
        if path.is_dir():
            fields = read_config(path, "load_model")
        elif path.exists() or path.is_absolute() or path.suffix == ".gguf":
            return None
        else:
            from transformers import AutoConfig

            reach_hub(name)
            fields = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
        alone = INPUTS.get(stock_class(fields, "load_model").main_input_name)
        both = {"vision_config", "text_config"} <= fields.keys()
        return IMAGES_WITH_TEXT if both and any(map(holds_images, filter(None, sources))) else alone
    except Exception:  # transformers raises a dozen kinds
        return None


def load_reader(kind: str, name: str, model: Any) -> Reader:
    """Return what makes the inputs of a model from files, without running code of its folder."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    path, given = Path(name), {"trust_remote_code": False}
    wanted = (saved.PROCESSOR_FILES, saved.TOKENIZER_FILES)
    there, texts = ([file for file in files if (path / file).exists()] for files in wanted)
    if path.is_dir() and not there:
        raise InputError(
            f"load_model: {name} has no processor to read {kind} with; put its "
            f"{saved.PROCESSOR_FILES[0]} into the folder, or call liar_ext.prune with batches of "
            "your own"
        )
    for file in there:
        read_json(path / file, "load_model")
    with reading(f"the processor of {name}", "load_model"):
        if kind == AUDIO:
            processor = AutoFeatureExtractor.from_pretrained(name, **given)
        else:  # by pillow, whose numbers don't depend on what else is installed
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", **given)
        if kind == IMAGES_WITH_TEXT:
            both = AutoProcessor.from_pretrained(name, **given)
            both.image_processor = processor
            return ImageTextReader(model, both)
    tokenizer = None
    if DECODER_IDS in inputs_read(model) and (texts or not path.is_dir()):
        with reading(f"the tokenizer of {name}", "load_model"):
            tokenizer = AutoTokenizer.from_pretrained(name, **given)
    return Reader(kind, model, processor, tokenizer)


def register() -> None:
    """Let transformers build the sizes in a config, now or as soon as somebody imports it."""
    if MODELING in sys.modules:
        _extend(sys.modules[MODELING])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Extends the module after its import, which takes seconds and may never be wanted."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = exec_module
        return spec


def _extend(module: Any) -> None:
    stock = module.PreTrainedModel.post_init
    if hasattr(stock, "builds_pruned"):
        return

    @functools.wraps(stock)
    def post_init(self: Any) -> None:
        if resize(self):
            wear(self)
        stock(self)

    post_init.builds_pruned = True
    module.PreTrainedModel.post_init = post_init
