"""A saved folder: the names of its files, their digests, and the output for a fixed input.

By the last one can tell, without any other data, that loaded weights still compute the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from liar_ext.models import liar_loader
from liar_ext.models.running import draw_inputs, evaluating, inputs_read, output_of, positions_of
from liar_ext.system.errors import InputError, refusing
from liar_ext.system.files import UNREADABLE, atomic_write, read_value

# Below a folder of its own: what globs *.safetensors at a folder's top takes all of it for weights,
# and what copies a model elsewhere leaves it behind.
OWN_FOLDER = "liar"
PLAN_FILE = f"{OWN_FOLDER}/plan.json"
FINGERPRINT_FILE = f"{OWN_FOLDER}/fingerprint.safetensors"
MANIFEST_FILE = f"{OWN_FOLDER}/manifest.json"
REPORT_JSON = f"{OWN_FOLDER}/report.json"
REPORT_MARKDOWN = f"{OWN_FOLDER}/report.md"
VOCABULARY_FILE = f"{OWN_FOLDER}/vocabulary.json"
RECIPE_YAML = f"{OWN_FOLDER}/recipe.yaml"
CARD_FILE = "README.md"
MODULES_FILE = "modules.json"  # of sentence-transformers
# What was exported from the folder, and where it lies.
EXPORTS_FILE = f"{OWN_FOLDER}/exports.json"
# In a folder that is being written, or removed: nobody else's folder has it.
MARKER_FILE = ".liar_saving"
MARK_VERSION = 2
# The code that from_pretrained(folder, trust_remote_code=True) runs, named by auto_map.
LOADER_MODULE = liar_loader.__name__.rpartition(".")[2]
LOADER_FILE = f"{LOADER_MODULE}.py"
LOADER_CODE = Path(liar_loader.__file__).read_text(encoding="utf-8")
# What transformers leaves on a model that it read from GGUF, and what forbids to save it.
QUANTISER_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
# Any of these says that a folder has a tokenizer.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
# Any of these describes the processor of a model that reads pictures or recordings.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

# Of version 0.1.0, whose folders are loaded.
OLD_MARK_VERSION = 1
OLD_PLAN_FILE = "liar_plan.json"

TOKENS = 16
NAMES = ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids")
MORE = "input:"  # what the names of further inputs begin with
DAMAGED = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError)
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Fingerprint:
    """What a model computed when it was saved: its inputs by name, and what came of them."""

    inputs: dict[str, Tensor]  # one sequence or image, or what each part of the model reads
    output: Tensor  # the logits, or the last hidden state if there is no head
    dtype: torch.dtype
    params: int  # shared ones counted once

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains: ``√ε · max |y|``."""
        return math.sqrt(torch.finfo(self.dtype).eps) * float(self.output.abs().max())


def write_fingerprint(model: nn.Module, folder: Path) -> None:
    """Run a model on a fixed random input, and write both to ``liar/fingerprint.safetensors``.

    An output that isn't finite is refused: nothing could be compared with it.
    """
    inputs = fixed_inputs(model)
    (name, value), *more = inputs.items()
    tensors = {"input": value, "output": run_on(model, inputs)}
    tensors |= {MORE + name: value for name, value in more}
    if not tensors["output"].isfinite().all():
        raise InputError(
            "save_pruned: the model's output for a random input holds NaN or infinity in "
            f"{model.dtype}, so it can't be verified once it is saved; look for damaged weights, "
            "or load and prune the model in a wider dtype"
        )
    attention = model.config._attn_implementation  # of the hub, it is no name of transformers' own
    facts = {
        "name": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention if str(attention).isidentifier() else "eager",
        "params": str(count_params(model)),
    }
    path = folder / FINGERPRINT_FILE
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata=facts)


def read_fingerprint(folder: Path) -> Fingerprint:
    """Read what :func:`write_fingerprint` wrote; refuse what it couldn't have written."""
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        raise InputError(
            f"verify: {folder} has no {FINGERPRINT_FILE}; save the model with save_pruned"
        )
    with refusing(f"verify: {path} is damaged", "copy the folder again", *DAMAGED, named=True):
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            more = [key for key in file.keys() if key.startswith(MORE)]  # noqa: SIM118, no mapping
            inputs = {facts["name"]: file.get_tensor("input")}
            inputs |= {key.removeprefix(MORE): file.get_tensor(key) for key in more}
            output = file.get_tensor("output")
        names, dtype, attention = list(inputs), facts["dtype"], facts["attention"]
        if not set(names) <= set(NAMES) or dtype not in DTYPES or not attention.isidentifier():
            raise ValueError(f"unknown names, dtype or attention {names, dtype, attention}")
        for name, value in inputs.items():
            tokens = value.dtype == torch.int64 and value.ndim == 2 and 0 < value.numel() <= TOKENS
            if name.endswith("_ids") and not tokens:
                raise ValueError(f"the input {name} is {tuple(value.shape)} of {value.dtype}")
        if not output.is_floating_point() or not output.numel():
            raise ValueError(f"the output is {tuple(output.shape)} of {output.dtype}")
        if not output.isfinite().all():
            raise ValueError("the output holds NaN or infinity, which agrees with nothing")
        return Fingerprint(inputs, output, getattr(torch, dtype), int(facts["params"]))


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def fixed_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return the input of a model's fingerprint, drawn at random, the same every time."""
    known = [
        getattr(config, name, TOKENS)
        for config in inputs_read(model).values()
        for name in ("max_position_embeddings", "max_target_positions")
    ]
    tokens = min(TOKENS, *known, positions_of(model) or TOKENS)
    return draw_inputs(model, 1, tokens, torch.Generator().manual_seed(0))


@torch.no_grad()
def run_on(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return logits, or the last hidden state, in float32 on the CPU; float64 stays."""
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    with evaluating(model):
        _, output = output_of(model, model(**given))
    return output.cpu() if output.dtype == torch.float64 else output.float().cpu()


MANIFEST_VERSION = 1
BLOCK = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file below a folder, with its digest, in ``liar/manifest.json``."""
    files = {name: digest(folder / name) for name in entries(folder) if name != MARKER_FILE}
    _write(folder / MANIFEST_FILE, files)


def add_to_manifest(folder: Path, name: str) -> None:
    """List one file more, or its new digest; what others put or changed stays a stranger."""
    path = folder / MANIFEST_FILE
    files = _listed(path)
    if files is not None and not path.is_symlink():
        _write(path, {**files, name: digest(folder / name)})


def strangers(folder: Path) -> list[str]:
    """Return the entries of a folder that ``save_pruned`` didn't write, or not as they are now.

    Without a manifest all are strangers, and none is gone into: the folder may be ``/``.
    """
    own = MARKER_FILE, MANIFEST_FILE
    if not os.path.lexists(folder / MANIFEST_FILE):
        return sorted(set(os.listdir(folder)) - {MARKER_FILE})
    files = _listed(folder / MANIFEST_FILE)
    if files is None:
        return [MANIFEST_FILE]
    found = [name for name in entries(folder) if name not in own]
    return [n for n in found if n not in files or digest(folder / n) != files[n]]


def changed_weights(folder: Path) -> list[str]:
    """Return the files of weights with other bytes than the manifest, if there is one, lists."""
    path = folder / MANIFEST_FILE
    listed = _listed(path) if os.path.lexists(path) else {}
    if listed is None:
        raise InputError(f"verify: {path} can't be read; copy the folder again")
    weights = [n for n in entries(folder) if n.endswith(".safetensors") and n in listed]
    # Of what a hub's cache holds, each file is a link.
    return [n for n in weights if digest(Path(os.path.realpath(folder / n))) != listed[n]]


def entries(folder: Path) -> list[str]:
    """Return what is no directory below a folder, and the empty directories, relative to it."""
    found = []
    for path in sorted(folder.iterdir()):
        inner = entries(path) if path.is_dir() and not path.is_symlink() else []
        found += [str(PurePosixPath(path.name, each)) for each in inner] or [path.name]
    return found


def digest(path: Path) -> str | None:
    """Return the SHA-256 of an ordinary file; None of anything else, a link for one."""
    if path.is_symlink() or not path.is_file():
        return None
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value.update(block)
    return value.hexdigest()


def _listed(path: Path) -> dict[str, str] | None:
    """Return the digests by name; None if the manifest can't be read."""
    try:
        return dict(read_value(path)["files"])
    except (*UNREADABLE, KeyError, TypeError):
        return None


def _write(path: Path, files: dict[str, str | None]) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:  # a killed run leaves the one that was
        text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n"
        file.write(text.encode())
