"""A fixed input with the output that a model had for it, kept beside its weights.

Whoever loads the weights later can tell, without any other data, that they still compute the
same.
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

from liar_ext.checkpoint.names import FINGERPRINT_FILE, MANIFEST_FILE, MARKER_FILE
from liar_ext.errors import InputError, one_line
from liar_ext.models.running import draw_inputs, inputs_read, output_of

TOKENS = 16
NAMES = ("input_ids", "pixel_values", "input_features", "decoder_input_ids")
MORE = "input:"  # what the names of further inputs begin with
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Fingerprint:
    """What a model computed when it was saved.

    Parameters
    ----------
    inputs : dict of str to Tensor
        Arguments of ``forward``: one sequence or image, ``input_ids`` or ``pixel_values``, or what
        each part of the model reads.
    output : Tensor
        The logits, or last hidden state where there is no head.
    dtype : torch.dtype
        Of the model.
    attention : str
        Attention implementation.
    params : int
        Parameters of the model, shared ones counted once.
    """

    inputs: dict[str, Tensor]
    output: Tensor
    dtype: torch.dtype
    attention: str
    params: int

    @property
    def tolerance(self) -> float:
        """Largest difference that rounding explains: ``√ε · max |y|``."""
        return math.sqrt(torch.finfo(self.dtype).eps) * float(self.output.abs().max())


def write_fingerprint(model: nn.Module, folder: Path) -> None:
    """Run a model on a fixed random input, and write both to ``liar/fingerprint.safetensors``.

    Raises
    ------
    InputError
        If the output isn't finite: nothing could be compared with it.
    """
    inputs = fixed_inputs(model)
    (name, value), *more = inputs.items()
    tensors = {"input": value, "output": _run(model, inputs)}
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
    """Read what :func:`write_fingerprint` wrote.

    Raises
    ------
    InputError
        If the folder has no fingerprint, or none that :func:`write_fingerprint` could have written.
    """
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        raise InputError(
            f"verify: {folder} has no {FINGERPRINT_FILE}; save the model with save_pruned"
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            more = [key for key in file.keys() if key.startswith(MORE)]  # noqa: SIM118, no mapping
            inputs = {facts["name"]: file.get_tensor("input")}
            inputs |= {key.removeprefix(MORE): file.get_tensor(key) for key in more}
            fingerprint = Fingerprint(
                inputs=inputs,
                output=file.get_tensor("output"),
                dtype=getattr(torch, facts["dtype"]),
                attention=facts["attention"],
                params=int(facts["params"]),
            )
        _check_fingerprint(fingerprint, facts["dtype"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"verify: {path} is damaged: {type(error).__name__}: {one_line(error)}; copy the "
            "folder again"
        ) from error
    return fingerprint


def _check_fingerprint(fingerprint: Fingerprint, dtype: str) -> None:
    """Raise ValueError unless a fingerprint is what :func:`write_fingerprint` writes."""
    names = list(fingerprint.inputs)
    if (
        not set(names) <= set(NAMES)
        or dtype not in DTYPES
        or not fingerprint.attention.isidentifier()
    ):
        raise ValueError(f"unknown names, dtype or attention {names, dtype, fingerprint.attention}")
    for name, value in fingerprint.inputs.items():
        tokens = value.dtype == torch.int64 and value.ndim == 2 and 0 < value.numel() <= TOKENS
        if name.endswith("_ids") and not tokens:
            raise ValueError(f"the input {name} is {tuple(value.shape)} of {value.dtype}")
    if not fingerprint.output.is_floating_point() or not fingerprint.output.numel():
        raise ValueError(
            f"the output is {tuple(fingerprint.output.shape)} of {fingerprint.output.dtype}"
        )
    if not fingerprint.output.isfinite().all():
        raise ValueError("the output holds NaN or infinity, which agrees with nothing")


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
    tokens = min(TOKENS, *known)
    return draw_inputs(model, 1, tokens, torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return logits, or the last hidden state, in float32 on the CPU."""
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    training = model.training
    model.eval()
    try:
        result = model(**given)
    finally:
        model.train(training)
    _, output = output_of(model, result)
    return output.cpu() if output.dtype == torch.float64 else output.float().cpu()


MANIFEST_VERSION = 1
BLOCK = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file below a folder, with its digest, in ``liar/manifest.json``."""
    files = {name: digest(folder / name) for name in entries(folder) if name != MARKER_FILE}
    _write(folder / MANIFEST_FILE, files)


def add_to_manifest(folder: Path, name: str) -> None:
    """List one file more, or its new digest; a folder without a readable manifest stays as it is.

    Files that others put there, or changed, stay strangers.
    """
    path = folder / MANIFEST_FILE
    files = _listed(path)
    if files is not None and not path.is_symlink():
        _write(path, {**files, name: digest(folder / name)})


def strangers(folder: Path, *, contents: bool = True) -> list[str]:
    """Return the entries of a folder that ``save_pruned`` didn't write, or not as they are now.

    Parameters
    ----------
    folder : Path
        An existing folder; an empty one holds no strangers.
    contents : bool
        Compare digests, too, and not only names: it reads every file.
    """
    found = [name for name in entries(folder) if name != MARKER_FILE]
    if MANIFEST_FILE not in found:
        return found
    files = _listed(folder / MANIFEST_FILE)
    if files is None:
        return [MANIFEST_FILE]
    return [
        name
        for name in found
        if name != MANIFEST_FILE
        and not (name in files and (not contents or digest(folder / name) == files[name]))
    ]


def entries(folder: Path) -> list[str]:
    """Return what is no directory below a folder, and the empty directories, relative to it."""
    found = []
    for path in sorted(folder.iterdir()):
        inner = entries(path) if path.is_dir() and not path.is_symlink() else []
        name = path.name
        found += [str(PurePosixPath(name, each)) for each in inner] or [name]
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
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, files: dict[str, str | None]) -> None:
    """Write the manifest beside its place and rename it: a killed run leaves the one that was."""
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n"
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
