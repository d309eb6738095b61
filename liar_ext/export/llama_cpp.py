"""Quantise GGUF files by llama.cpp's own quantiser, and run them.

The quantiser is the program ``llama-quantize`` if it is on the path, else the library of the
package ``llama-cpp-py-sync``, which also runs files. Both have a process of their own: llama.cpp
ends its process if it can't go on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from liar_ext.export.gguf_tensors import ROUTER
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
    """Write ``source`` in another type; return what the user should know."""
    program = shutil.which(PROGRAM)
    if program is not None:
        command = [program, str(source), str(out), kind.upper()]
    else:
        command = child(WORKER, "quantize", source, out, TYPES[kind])
    done = _finished(command)
    if done.returncode or not out.is_file():
        raise InputError(
            f"export: llama.cpp's quantiser failed ({done.returncode}): {_end(done)}; give "
            "--quantize f16"
        )
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
        done = _finished(child(WORKER, "logits" if logits else "score", path, given, out))
        if done.returncode:
            raise InputError(
                f"export: llama.cpp can't run {path.name} ({done.returncode}): {_end(done)}; "
                "update llama-cpp-py-sync, or use the folder itself"
            )
        with np.load(out) as found:
            return dict(found)


def _finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; where llama.cpp asserts, its words and no stack are the last."""
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=quiet)


def _end(done: subprocess.CompletedProcess[str]) -> str:
    """Return the end of what a process said, as one line."""
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return " / ".join(said[-3:])[-250:]


def _left_out(path: Path, kind: str) -> list[str]:
    """Return a note on the matrices whose width no group divides."""
    import gguf

    found = [each for each in gguf.GGUFReader(path).tensors if len(each.shape) > 1]
    matrices = [each for each in found if not each.name.endswith(ROUTER)]  # no type changes them
    floats = ("F32", "F16", "BF16")
    odd = [each for each in matrices if each.tensor_type.name in floats]
    if not odd:
        return []
    names = sorted({re.sub(r"blk\.\d+\.", "", each.name) for each in odd})
    widths = sorted({int(each.shape[0]) for each in odd})
    return [
        f"{len(odd)} of {len(matrices)} matrices stay {odd[0].tensor_type.name} ({', '.join(names)}"
        f"): their widths ({', '.join(map(str, widths[:4]))}{', ...' if len(widths) > 4 else ''}) "
        f"aren't multiples of {GROUP}, which {kind} needs."
    ]
