"""Cells of other runtimes: vLLM, llama.cpp, ONNX Runtime."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from measures import NATS, ROOT, Row, gap, script, sentences


def vllm(job: dict) -> Row:
    """Compare greedy tokens and log-probabilities, or embeddings, with those of transformers."""
    reference = Path(job["reference"])
    if not reference.exists():
        raise RuntimeError("transformers gave nothing to compare with")
    with_reference = json.loads(reference.read_text(encoding="utf-8"))
    if not job["causal"]:
        return _vllm_embeddings(job, np.array(with_reference["embeddings"]))
    theirs = script("tests/integrations/check_vllm.py").by_vllm(Path(job["folder"]))
    tokens, wanted = sum(theirs["tokens"], []), sum(with_reference["tokens"], [])
    pairs = zip(sum(theirs["logprobs"], []), sum(with_reference["logprobs"], []), strict=True)
    apart = max(abs(one - other) for one, other in pairs)
    same = sum(one == other for one, other in zip(tokens, wanted, strict=True))
    return {
        "number": f"{apart:.0e}, {same}/{len(wanted)} tokens",
        "good": same == len(wanted) and apart <= NATS,
        "difference": apart,
        "built_by": theirs["built by"],
    }


def _vllm_embeddings(job: dict, wanted: np.ndarray) -> Row:
    from vllm import LLM

    engine = LLM(
        job["folder"], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256,
        max_num_seqs=4,
    )  # fmt: skip
    found = np.array([each.outputs.embedding for each in engine.embed(job["texts"])])
    return gap(found, wanted)


def vllm_reference(job: dict) -> Row:
    """Write what transformers, or sentence-transformers, makes of the same prompts."""
    if job["causal"]:
        found = script("tests/integrations/check_vllm.py").by_transformers(Path(job["folder"]))
    else:
        found = {"embeddings": sentences(job, job["folder"]).tolist()}
    Path(job["reference"]).write_text(json.dumps(found), encoding="utf-8")
    return {"number": "", "good": True}


def llama_cpp(job: dict) -> Row:
    """Export as float32 GGUF, and compare log-likelihoods of a text with transformers'."""
    from liar_ext.checkpoint import load_model
    from liar_ext.export import export
    from liar_ext.export.llama_cpp import run_file

    sys.path.insert(0, str(ROOT / "bench"))  # it imports its neighbour
    path = Path(job["room"], "model.gguf")
    export(job["folder"], "gguf", path, overwrite=True, progress=False, check=False, quantize="f32")
    ids = np.load(job["ids"])
    theirs = run_file(path, ids)["nll"]
    ours = script("bench/check_gguf.py").likelihoods(load_model(job["folder"])[0], ids)
    apart = float(np.abs(ours - theirs).max())
    perplexities = [math.exp(each.mean()) for each in (theirs, ours)]
    return {
        "number": f"{apart:.0e}, ppl {perplexities[0]:.4g}",
        "good": apart <= NATS,
        "difference": apart,
        "perplexity": perplexities,
    }


def onnx_runtime(job: dict) -> Row:
    """Export as an ONNX graph, and compare embeddings with sentence-transformers'."""
    from liar_ext.export import export

    out = Path(job["room"], "onnx")
    export(job["folder"], "onnx", out, overwrite=True, progress=False)
    sys.path.insert(0, str(ROOT / "bench"))  # it imports its neighbour
    encode = script("bench/sentences.py").onnxruntime_encoder(out)
    return gap(encode(job["texts"], 4), sentences(job, job["folder"]))
