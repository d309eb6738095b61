"""Quantise GGUF files by llama.cpp's quantiser, and run them, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from liar_ext.system.environment import child
from liar_ext.system.errors import InputError

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
PROGRAM, LIBRARY = "llama-quantize", "llama_cpp_py_sync"
# The types of llama.h, enum llama_ftype, by the names that llama-quantize has for them.
TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11,
    "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
    "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip
ROUTER = "ffn_gate_inp.weight"  # how the names of routers end: they stay float32 in any type
GROUP = 32  # weights that share a scale in q8_0 and its kin; the K types have 256


def check_type(kind: str) -> None:
    """Refuse a type that can't be made here, before anything is written."""
    if kind not in TYPES:
        raise InputError(
            f"export: --quantize must be one of f32, f16, bf16, {', '.join(TYPES)}, got "
            f"{kind[:40]!r}"
        )
    if shutil.which(PROGRAM) is None and find_spec(LIBRARY) is None:
        raise InputError(
            f"export: --quantize {kind} needs llama.cpp's quantiser: put {PROGRAM} on the PATH, or "
            "pip install llama-cpp-py-sync; f32, f16 and bf16 need neither"
        )


def quantize_file(source: Path, out: Path, kind: str) -> list[str]:
    """Write ``source`` in another type by the program, or the library; return notes."""
    program = shutil.which(PROGRAM)
    if program is not None:
        command = [program, str(source), str(out), kind.upper()]
    else:
        command = child(WORKER, "quantize", source, out, TYPES[kind])
    _finish(command, out, "llama.cpp's quantiser failed", "give --quantize f16")
    return _left_out(out, kind)


def run_file(path: Path, ids: np.ndarray, *, logits: bool = False) -> dict[str, np.ndarray]:
    """Return what llama.cpp computes for token ids, (sequences, tokens), without padding.

    ``nll`` is ``-log p(token | those before it)``, (sequences, tokens - 1), float64; ``seconds``
    are without loading; and ``logits``, if they are asked for, are (sequences, tokens, vocabulary).
    """
    if find_spec(LIBRARY) is None:
        raise InputError("export: running a GGUF file needs pip install llama-cpp-py-sync")
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "ids.npy"), Path(folder, "out.npz")
        np.save(given, np.ascontiguousarray(ids, dtype=np.int32))
        command = child(WORKER, "logits" if logits else "score", path, given, out)
        hint = "update llama-cpp-py-sync, or use the folder itself"
        _finish(command, out, f"llama.cpp can't run {path.name}", hint)
        with np.load(out) as found:
            return dict(found)


def _finish(command: list[str], out: Path, what: str, hint: str) -> None:
    """Run a command to its end; refuse one that fails, with the end of what it said."""
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # where llama.cpp asserts: words, no stack
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=quiet)
    if done.returncode or not out.is_file():
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        end = " / ".join(said[-3:])[-250:]
        raise InputError(f"export: {what} ({done.returncode}): {end}; {hint}")


def _left_out(path: Path, kind: str) -> list[str]:
    """Return a note on the matrices whose width no group divides."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    matrices = [t for t in tensors if len(t.shape) > 1 and not t.name.endswith(ROUTER)]
    odd = [t for t in matrices if t.tensor_type.name in ("F32", "F16", "BF16")]
    if not odd:
        return []
    names = sorted({re.sub(r"blk\.\d+\.", "", each.name) for each in odd})
    widths = sorted({int(each.shape[0]) for each in odd})
    return [
        f"{len(odd)} of {len(matrices)} matrices stay {odd[0].tensor_type.name} ({', '.join(names)}"
        f"): their widths ({', '.join(map(str, widths[:4]))}{', ...' if len(widths) > 4 else ''}) "
        f"aren't multiples of {GROUP}, which {kind} needs."
    ]
