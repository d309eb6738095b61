"""Prove that a saved model is the one that was saved, wherever it is loaded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liar_ext.checkpoint.carrying import compare_tokenization
from liar_ext.checkpoint.folder import (
    FINGERPRINT_FILE,
    Fingerprint,
    changed_weights,
    read_fingerprint,
)
from liar_ext.checkpoint.inspection import (
    CLASS_NAME,
    check_code,
    inspect_folder,
    read_config,
    read_marked_config,
    reading,
    refuse_diffusion,
    stock_class,
)
from liar_ext.checkpoint.loading import placement
from liar_ext.export import verify_worker
from liar_ext.export.exporting import read_record
from liar_ext.export.verify_worker import TOKENS, median_seconds, timed_text
from liar_ext.system.environment import child
from liar_ext.system.errors import InputError, one_line, refusing
from liar_ext.system.progress import quiet

WORKER = Path(verify_worker.__file__)
# Weights of other types have their own rounding: the difference is told, and nothing is demanded.
EXACT = ("", "f32", "float32")
# Float32 sums in the order of another runtime, over a model's depth, over its largest output.
OTHER_RUNTIME = 1e-3


@dataclass(frozen=True)
class Row:
    """One way to load a folder, and what came of it."""

    how: str  # the loader, or the format and its file
    error: str = ""  # why it doesn't load
    difference: float | None = None  # the greatest of its output from the one that was saved
    agrees: bool = False  # it computes what was saved; of a quantised export, it loads
    perplexity: float | None = None  # on the text that was given
    tokens_per_second: float | None = None  # over 128 tokens, batch 1; of images, images
    megabytes: float = 0.0  # of the weights on disk
    quantised: bool = False  # its weights have their own rounding: outputs differ by nature


def verify_pruned(folder: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """Reload a folder by every loader that it claims, in this process, and compare outputs.

    The output on the fixed input of the folder's fingerprint agrees if
    ``max |y − ŷ| ≤ √ε · max |y|``, ε of the model's dtype: half of its digits. ``liar verify`` does
    the same in processes without liar_ext, and also tries the folder's exports.

    Parameters
    ----------
    folder : path
        What :func:`liar_ext.save_pruned` wrote.
    device : str
        Where to run, as for :func:`liar_ext.checkpoint.load_model`; another device than the saved
        model's computes slightly other numbers.

    Returns
    -------
    dict
        ``agrees`` (all of them, and no weights changed), ``changed`` (files of weights with other
        bytes than were saved), ``layers`` ("equal" or "unequal"), ``dtype``, ``params``,
        ``tolerance``, and ``loaders``: by name ``max_abs_difference``, ``params``, ``agrees``.

    Raises
    ------
    InputError
        If the folder isn't one of ours, is damaged, has code that isn't ours, or there is no such
        device. A loader in the folder is run only if it is, byte for byte, that of ``save_pruned``.
    """
    facts, fingerprint, jobs = _claims(folder, device)
    loaders = {}
    for how, job in jobs.items():
        with quiet(), reading(folder, "verify"):
            model = verify_worker.load(job)
        what = "verify: the model can't run on the fingerprint's input"
        kinds = (RuntimeError, ValueError, TypeError, LookupError)
        with refusing(what, "copy the folder again", *kinds):
            found = verify_worker.compare(model, job)
        agrees = _agrees(found, fingerprint)
        difference, params = found["difference"], found["params"]
        loaders[how] = {"max_abs_difference": difference, "params": params, "agrees": agrees}
        del model
    agrees = not facts["changed"] and all(each["agrees"] for each in loaders.values())
    return facts | {"agrees": agrees, "loaders": loaders}


def verify_everywhere(
    folder: str | os.PathLike[str], device: str = "cpu", ids: np.ndarray | None = None
) -> dict[str, Any]:
    """Reload a folder by every loader that it claims, and its exports, in fresh processes.

    ``ids``, ``(sequences, tokens)``, are for perplexity. It returns and raises what
    :func:`verify_pruned` does, with ``rows``, each a :class:`Row`, in place of ``loaders``.
    """
    facts, fingerprint, jobs = _claims(folder, device)
    folder = Path(facts["folder"])
    with tempfile.TemporaryDirectory() as room:
        if ids is not None:
            path = os.path.join(room, "ids.npy")
            np.save(path, ids)
            jobs = {how: job | {"ids": path} for how, job in jobs.items()}
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        rows = _loaded(jobs, fingerprint, weights)
    rows += _exports(folder, fingerprint, ids)
    reads = compare_tokenization(folder)
    facts |= {} if reads is None else {"tokenizer_agrees": reads}
    agrees = not facts["changed"] and all(row.agrees for row in rows) and reads is not False
    return facts | {"rows": rows, "agrees": agrees}


def _claims(
    folder: str | os.PathLike[str], device: str
) -> tuple[dict[str, Any], Fingerprint, dict[str, dict[str, Any]]]:
    """Return what a folder says of itself, and a job of the worker for each loader, by its name."""
    placement(device)
    folder = Path(os.path.abspath(folder))
    config = read_marked_config(folder)
    if CLASS_NAME in config:
        refuse_diffusion("verify", f"{folder} holds a model of diffusers, and no output of it")
    autos = check_code(folder, config)
    fingerprint = read_fingerprint(folder)
    inspect_folder(folder, "verify")
    loaders = {"liar_ext.load_pruned": ("liar_ext", False)}
    if config["liar"]["layers"] == "equal":
        name = stock_class(config, "load_pruned").__name__
        loaders[f"transformers.{name}.from_pretrained"] = (name, False)
    for name in autos[:1]:
        loaders[f"transformers.{name}.from_pretrained(trust_remote_code=True)"] = (name, True)
    facts = {
        "folder": str(folder),
        "layers": config["liar"]["layers"],
        "dtype": str(fingerprint.dtype).removeprefix("torch."),
        "params": fingerprint.params,
        "tolerance": fingerprint.tolerance,
        "changed": changed_weights(folder),
    }
    jobs = {how: _job(folder, device, *loader) for how, loader in loaders.items()}
    return facts, fingerprint, jobs


def _job(folder: Path, device: str, loader: str, code: bool = False) -> dict[str, Any]:
    """Return what the worker needs to know of a folder and a loader."""
    saved = str(folder / FINGERPRINT_FILE)
    known = {"folder": str(folder), "device": device, "fingerprint": saved}
    return known | {"ids": None, "loader": loader, "code": code}


def _agrees(found: Mapping[str, Any], fingerprint: Fingerprint) -> bool:
    """Tell whether a loaded model is the one that was saved, but for rounding."""
    same = found["params"] == fingerprint.params
    return same and found["difference"] <= fingerprint.tolerance


def _loaded(
    jobs: Mapping[str, dict[str, Any]], fingerprint: Fingerprint, megabytes: float
) -> list[Row]:
    # A device that is asked for by a parent is lost to its forks.
    forks = sys.platform == "linux" and all(job["device"] == "cpu" for job in jobs.values())
    groups = [list(jobs.values())] if forks else [[job] for job in jobs.values()]
    found, rows = [each for group in groups for each in _answers(group)], []
    for how, answer in zip(jobs, found, strict=True):
        if "error" in answer:
            rows.append(Row(how, one_line(answer["error"])))
        else:
            agrees = _agrees(answer, fingerprint)
            del answer["params"]
            rows.append(Row(how, agrees=agrees, megabytes=megabytes, **answer))
    return rows


def _answers(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the worker says of each job; where it ended before, why."""
    done = subprocess.run(
        child(WORKER),
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    error = said[-1] if said and done.returncode else f"exit code {done.returncode}"
    return found + [{"error": error}] * (len(jobs) - len(found))


def _exports(folder: Path, fingerprint: Fingerprint, ids: np.ndarray | None) -> Iterator[Row]:
    """Yield a row for each export that the folder has a record of."""
    run = {"gguf": _run_gguf, "onnx": _run_onnx}
    for entry in read_record(folder):
        path = Path(os.path.normpath(folder / entry["path"]))
        options = entry.get("options")
        kind = options.get("quantize") if isinstance(options, dict) else None
        how = f"{entry['format']} {path.name}{f' ({kind})' if kind else ''}"
        try:
            if not path.exists():
                raise InputError(f"verify: {path} isn't there; export it again")
            if entry["format"] == "uniform":
                own, stock = read_fingerprint(path), stock_class(read_marked_config(path), "verify")
                job = _job(path, "cpu", stock.__name__)
                yield from _loaded({how: job}, own, _megabytes(path))
            elif entry["format"] in run:
                found = run[entry["format"]](path, fingerprint, ids)
                limit = OTHER_RUNTIME * max(1.0, float(fingerprint.output.abs().max()))
                limit = max(limit, fingerprint.tolerance)
                quantised = str(kind or "").lower() not in EXACT
                agrees = found["difference"] <= (sys.float_info.max if quantised else limit)
                size = _megabytes(path)
                yield Row(how, agrees=agrees, megabytes=size, quantised=quantised, **found)
        except InputError as error:
            yield Row(how, one_line(error))


def _run_gguf(path: Path, fingerprint: Fingerprint, ids: np.ndarray | None) -> dict[str, Any]:
    """Compare what llama.cpp computes for the fingerprint's input; measure speed and perplexity."""
    from liar_ext.export.llama_cpp import run_file

    given = next(iter(fingerprint.inputs.values())).numpy()
    expected = fingerprint.output.float().numpy()
    found = run_file(path, given, logits=True)["logits"][..., : expected.shape[-1]]
    same = found.shape == expected.shape
    row = {"difference": float(np.abs(found - expected).max()) if same else math.inf}
    timed = run_file(path, np.resize(given, (1, TOKENS)))
    row["tokens_per_second"] = TOKENS / float(timed["seconds"])
    if ids is not None:
        row["perplexity"] = float(np.exp(run_file(path, ids)["nll"].mean()))
    return row


def _run_onnx(path: Path, fingerprint: Fingerprint, ids: np.ndarray | None) -> dict[str, Any]:
    """Return what onnxruntime computes for the fingerprint's input."""
    with refusing("verify: ONNX needs onnxruntime", "pip install onnxruntime", Exception):
        import onnxruntime
    with refusing(f"verify: onnxruntime can't run {path}", "", Exception):
        session = onnxruntime.InferenceSession(
            path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        expected = fingerprint.output.float().numpy()
        ((name, given),) = ((name, value.numpy()) for name, value in fingerprint.inputs.items())

        def run(value: np.ndarray) -> list[np.ndarray]:
            inputs = {name: value}
            for each in session.get_inputs():
                fill = np.ones if each.name == "attention_mask" else np.zeros
                inputs.setdefault(each.name, fill(value.shape, dtype=value.dtype))
            return session.run(None, inputs)

        found = [each for each in run(given) if each.shape == expected.shape]
        gaps = [float(np.abs(each - expected).max()) for each in found]
        if name == "input_ids":
            given = timed_text(given, read_config(path, "verify").get("max_position_embeddings"))
        speed = given.shape[name == "input_ids"] / median_seconds(lambda: run(given))
    return {"difference": min(gaps, default=math.inf), "tokens_per_second": speed}


def _megabytes(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    weights = (".safetensors", ".gguf", ".onnx", ".data")
    return sum(f.stat().st_size for f in files if f.is_file() and f.suffix in weights) / 1e6


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines of text, a loader each."""
    lines = []
    for row in rows:
        if row.error:
            lines.append(f"{row.how}: DOESN'T LOAD: {row.error}")
            continue
        verdict = "loads, quantised" if row.quantised else "same outputs"
        words = [f"{row.how}: {verdict if row.agrees else 'OTHER OUTPUTS'}"]
        words.append(f"difference {row.difference:.1e}")
        if row.perplexity is not None:
            words.append(f"perplexity {row.perplexity:.3f}")
        words += [f"{row.tokens_per_second:,.0f} tokens/s", f"{row.megabytes:,.1f} MB"]
        lines.append(", ".join(words))
    return lines
