"""What sentence-transformers does after the encoder: read from its files, built in plain torch.

``modules.json`` names a chain of modules and a folder of settings for each. The names are looked up
in a table and never imported. Folders and links that lead out of the model folder are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liar_ext.checkpoint.carrying import MODULES_FILE
from liar_ext.checkpoint.inspection import WEIGHTS, check_inside, read_json
from liar_ext.system.errors import InputError, one_line, refusing
from liar_ext.system.untrusted import UNREADABLE, read_value

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
            try:
                save_file(tensors, out / name)
            except SafetensorError as error:  # of a full disk, for one
                raise OSError(f"{name} can't be saved: {one_line(error)}") from error


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
        entries, _ = read_value(path)
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
    check_inside(path, folder)
    if not path.is_file():
        raise InputError(f"{path} is missing, or no file; copy the folder again")
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
    ends = {fields.get("module_input_name"), fields.get("module_output_name")}
    if ends - {None, "sentence_embedding"}:
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
