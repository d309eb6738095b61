"""What stands around a model: its tokenizer or processor, and the chain of sentence-transformers.

``modules.json`` of sentence-transformers names a chain of modules, and a folder of settings for
each. The names are looked up in a table and never imported, the modules built in plain torch.
Folders and links that lead out of the model folder are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liar_ext.calibration.image_text import ImageTextReader, holds_images
from liar_ext.calibration.media import AUDIO, IMAGES_WITH_TEXT, INPUTS, Reader
from liar_ext.checkpoint.carrying import source_folder
from liar_ext.checkpoint.folder import MODULES_FILE, PROCESSOR_FILES, TOKENIZER_FILES
from liar_ext.checkpoint.inspection import (
    WEIGHTS,
    check_file,
    check_inside,
    reach_hub,
    read_config,
    reading,
    stock_class,
)
from liar_ext.models.running import DECODER_IDS, inputs_read, known_tokens, predicts_next_token
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.files import UNREADABLE, read_json, read_value

# Settings of the whole chain: the longest text, prompts, which similarity is meant.
SETTINGS = re.compile(r"sentence_[a-z-]+_config\.json|config_sentence_transformers\.json")
MOST_MODULES = 16
# In the order in which sentence-transformers joins them.
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens")
OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
KINDS = ("Transformer", "Pooling", "Normalize", "Dense")
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU")  # of torch.nn
HERE = PurePosixPath(".")


class Pooling(nn.Module):
    """One vector of a sequence: ``Σ m_t h_t / Σ m_t`` (mean), h of the first token, or the maximum.

    Several are joined. ``m`` is the attention mask, (batch, tokens), and h (batch, tokens, hidden).
    """

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, hidden · modes)."""
        return torch.cat([self._pool(mode, states, mask) for mode in self.modes], -1)

    def _pool(self, mode: str, states: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(-1).to(states.dtype)
        if mode == "cls":  # the first token that is none of the padding, which may be on the left
            first = mask.to(torch.int32).argmax(1)
            return states.gather(1, first.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
        if mode == "max":
            return states.masked_fill(weights == 0, float("-inf")).amax(1)
        count = weights.sum(1).clamp(min=1e-9)
        return (states * weights).sum(1) / (count.sqrt() if "sqrt" in mode else count)


class Normalize(nn.Module):
    """``y / |y|``."""

    def forward(self, vector: Tensor) -> Tensor:
        """Return vectors of length 1."""
        return nn.functional.normalize(vector, dim=-1)


@dataclass
class Sentence:
    """The chain after the encoder, and the files that describe it, by their paths."""

    pooling: Pooling  # tokens to a vector
    rest: nn.Sequential  # what is done with the vector
    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        """Write the files, by which sentence-transformers finds the chain."""
        for name, text in self.files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
        for name, tensors in self.tensors.items():
            save_file(tensors, out / name)


def read_sentence(folder: Path) -> Sentence | None:
    """Return what sentence-transformers does after the encoder of a folder; None if nothing.

    A file that is damaged, leads out of the folder, or names a module or a setting that isn't in
    the table, is refused.
    """
    if not os.path.lexists(folder / MODULES_FILE):
        return None
    chain = _read_chain(folder)
    if chain[0] != ("Transformer", HERE):
        raise _cannot(f"its chain begins with {chain[0][0]} in {str(chain[0][1])!r}")
    if len(chain) == 1:
        return None
    for kind, path in chain[1:]:
        if kind != "Normalize" and path == HERE:
            raise _cannot(f"{kind} has no folder of its own")
    if chain[1][0] != "Pooling":
        raise _cannot(f"{chain[1][0]} comes after the encoder, where Pooling is expected")
    # With names that every version of sentence-transformers reads.
    entries = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if path == HERE else str(path),
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, path) in enumerate(chain)
    ]
    files = {MODULES_FILE: _text(entries)}
    files |= {name: _text(fields) for name, fields in _settings(folder, "export").items()}
    sentence = Sentence(_read_pooling(folder, chain[1][1], files), nn.Sequential(), files)
    for kind, path in chain[2:]:
        if kind == "Normalize":
            sentence.rest.append(Normalize())
        elif kind == "Dense":
            _add_dense(folder, path, sentence)
        else:
            raise _cannot(f"{kind} is applied to the pooled vector")
    return sentence


def longest_text(folder: Path) -> Any:
    """Return after how many tokens sentence-transformers cuts a text; None if no file says it."""
    if not os.path.lexists(folder / MODULES_FILE):
        return None
    found = (each.get("max_seq_length") for each in _settings(folder, "load_model").values())
    return next((longest for longest in found if longest is not None), None)


def _settings(folder: Path, operation: str) -> dict[str, dict[str, Any]]:
    """Return what the files of settings of the whole chain hold, by their names."""
    names = [path.name for path in sorted(folder.iterdir()) if SETTINGS.fullmatch(path.name)]
    return {name: read_json(_inside(folder, PurePosixPath(name)), operation) for name in names}


def _read_chain(folder: Path) -> list[tuple[str, PurePosixPath]]:
    path, chain = _inside(folder, PurePosixPath(MODULES_FILE)), []
    what, kinds = f"sentence encoder: {folder} holds no readable {MODULES_FILE}", UNREADABLE
    with refusing(what, "copy the folder again", *kinds, KeyError, TypeError, named=True):
        entries = read_value(path)
        if not isinstance(entries, list) or not 0 < len(entries) <= MOST_MODULES:
            raise ValueError(f"it must be a list of 1 to {MOST_MODULES} modules")
        named = [(str(entry["type"]), entry["path"]) for entry in entries]
        named = [(kind, name, PurePosixPath(name)) for kind, name in named]
    for kind, name, place in named:
        last = kind.rpartition(".")[2]
        if kind.split(".")[0] != "sentence_transformers" or last not in KINDS:
            raise _cannot(f"{MODULES_FILE} names {kind[:80]!r}, and known are {', '.join(KINDS)}")
        if place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name:
            raise _cannot(f"{MODULES_FILE} has the path {name[:80]!r}, which leads out of it")
        chain.append((last, place))
    return chain


def _inside(folder: Path, name: PurePosixPath) -> Path:
    """Return a file of the folder; refuse a link that leads out of it."""
    path = folder / name
    check_file(path, "sentence encoder")
    check_inside(path, folder)
    return path


def read_inside(folder: Path, name: PurePosixPath) -> dict[str, Any]:
    """Return the object in a JSON file of the folder; refuse a link that leads out of it."""
    return read_json(_inside(folder, name), "export")


def _read_pooling(folder: Path, path: PurePosixPath, files: dict[str, str]) -> Pooling:
    """Return the pooling that a folder's config says, as versions before and after 5.4 write it."""
    name = path / "config.json"
    fields = read_inside(folder, name)
    modes = fields.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in OLD_POOLINGS.items() if fields.get(key) is True] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not set(map(str, modes)) <= set(POOLINGS):
        raise _cannot(f"{name} asks for {str(modes)[:80]}, and known are {', '.join(POOLINGS)}")
    if fields.get("include_prompt", True) is not True:
        raise _cannot(f"{name} leaves prompts out of the pooling, which the graph can't see")
    if len(set(modes)) < len(modes):
        raise _cannot(f"{name} asks for {', '.join(modes)}, one of them twice")
    files[str(name)] = _text(fields)
    return Pooling(modes)


def _add_dense(folder: Path, path: PurePosixPath, sentence: Sentence) -> None:
    name = path / "config.json"
    fields = read_inside(folder, name)
    d_in, d_out, bias = (fields.get(key) for key in ("in_features", "out_features", "bias"))
    bias = True if bias is None else bias
    activation = str(fields.get("activation_function", "torch.nn.modules.activation.Tanh"))
    *package, activation = activation.split(".")
    if activation not in ACTIVATIONS or package[:2] != ["torch", "nn"]:
        raise _cannot(f"{name} names the activation {activation[:80]!r}, which isn't known")
    ends = fields.get("module_input_name"), fields.get("module_output_name")
    if any(end not in (None, "sentence_embedding") for end in ends):
        raise _cannot(f"{name} reads or writes something else than the sentence's embedding")
    if not os.path.lexists(folder / path / WEIGHTS):
        raise _cannot(f"{path} has no {WEIGHTS}, and other formats can run code when they are read")
    what = f"sentence encoder: {folder / path / WEIGHTS} is damaged"
    with refusing(what, "copy it again", OSError, SafetensorError, ValueError):
        tensors = load_file(_inside(folder, path / WEIGHTS))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != {"linear.weight": (d_out, d_in)} | ({"linear.bias": (d_out,)} if bias else {}):
        raise InputError(
            f"sentence encoder: {folder / path} has weights {shapes}, its config.json says {d_in} "
            f"to {d_out} features, {'with' if bias else 'without'} bias; copy the folder again"
        )
    linear = nn.Linear(d_in, d_out, bias=bool(bias), device="meta")
    own = {key.removeprefix("linear."): tensor for key, tensor in tensors.items()}
    linear.load_state_dict(own, assign=True)
    sentence.rest.extend([linear.float(), getattr(nn, activation)()])
    sentence.files[str(name)] = _text(fields)
    sentence.tensors[str(path / WEIGHTS)] = tensors


def _text(fields: Any) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _cannot(why: str) -> InputError:
    return InputError(
        f"sentence encoder: {why}; copy the folder without modules.json, for its token embeddings "
        "alone"
    )


@contextmanager
def only_file(path: Path) -> Iterator[dict[str, Any]]:
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
        with reading(path, "load_model"), only_file(path) as found:
            return AutoTokenizer.from_pretrained(**found)
    if model.main_input_name != "input_ids":
        return None  # a vision model, which has a processor
    if path.is_dir():
        there = [file for file in TOKENIZER_FILES if (path / file).exists()]
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
    wanted = (PROCESSOR_FILES, TOKENIZER_FILES)
    there, texts = ([file for file in files if (path / file).exists()] for files in wanted)
    if path.is_dir() and not there:
        raise InputError(
            f"load_model: {name} has no processor to read {kind} with; put its "
            f"{PROCESSOR_FILES[0]} into the folder, or call liar_ext.prune with batches of "
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
