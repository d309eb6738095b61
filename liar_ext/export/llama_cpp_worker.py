"""A script that runs llama.cpp, which ends its process where it can't go on.

It needs ``llama-cpp-py-sync`` and numpy, and not torch, whose import takes seconds::

    quantize SOURCE OUT TYPE        TYPE: a number of llama.h, enum llama_ftype
    score    FILE IDS.npy OUT.npz   ids (sequences, tokens): nll (sequences, tokens - 1), seconds
    logits   FILE IDS.npy OUT.npz   and logits (sequences, tokens, vocabulary)
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np


def main(command: str, *arguments: str) -> int:
    """Run a command and return its exit code."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library = get_ffi(), get_lib()
    if command == "quantize":
        source, out, kind = arguments
        settings = ffi.new("llama_model_quantize_params *")
        settings[0] = library.llama_model_quantize_default_params()
        settings.ftype = int(kind)
        return int(library.llama_model_quantize(os.fsencode(source), os.fsencode(out), settings))
    path, given, out = arguments
    library.llama_backend_init()
    settings = library.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = library.llama_model_load_from_file(os.fsencode(path), settings)
    if model == ffi.NULL:
        raise SystemExit(f"llama.cpp can't load {path}")
    ids, start = np.load(given), time.perf_counter()
    found = score(ffi, library, model, ids, keep=command == "logits")
    np.savez(out, **found, seconds=time.perf_counter() - start)
    return 0


def score(
    ffi: Any, library: Any, model: Any, ids: np.ndarray, *, keep: bool
) -> dict[str, np.ndarray]:
    """Return the negative log-likelihood of each token but the first, and the logits if kept."""
    sequences, length = ids.shape
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    # OpenMP takes a list of numbers, a level of nesting each, and passes over what is none.
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = int(threads) if threads.isdecimal() and 0 < int(threads) < 2**15 else 1
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = 0  # keys and values as float32, by default float16
    settings.flash_attn_type = 0
    context = library.llama_init_from_model(model, settings)
    if context == ffi.NULL:
        raise SystemExit("llama.cpp can't run this model")
    rows = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    losses, logits = np.zeros((sequences, length - 1)), []
    batch = library.llama_batch_init(length, 0, 1)
    for index, tokens in enumerate(ids.tolist()):
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch.n_tokens = length
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        if library.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp can't decode")
        raw = ffi.buffer(library.llama_get_logits(context), 4 * rows * length)
        found = np.frombuffer(raw, dtype=np.float32).reshape(length, rows).astype(np.float64)
        if keep:
            logits.append(found)
        largest = found[:-1].max(1)
        total = largest + np.log(np.exp(found[:-1] - largest[:, None]).sum(1))
        losses[index] = total - found[np.arange(length - 1), tokens[1:]]
    return {"nll": losses, "logits": np.array(logits)} if keep else {"nll": losses}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
