"""Compile the CUDA kernels with bare nvcc, without torch and without a GPU; used by setup.py.

Environment: ``LIAR_CUDA`` is ``auto`` (compile them where a toolkit is found), ``0`` (never) or
``1`` (fail without). ``LIAR_CUDA_ARCHS`` lists compute capabilities, separated by semicolons;
``+PTX`` after one embeds its PTX for devices to come. ``MAX_JOBS`` compilers run at a time.
"""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# No kernel needs more than 8.0 offers, so its PTX runs on every later device that isn't listed, at
# the price of a compilation when first loaded. Code for 10.0 runs on 10.3 and that for 12.0 on
# 12.1, as no `a` ties it to one chip.
ARCHS = "8.0+PTX;8.6;8.9;9.0;10.0;12.0"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v"]


def find_toolkit() -> Path | None:
    """Return the folder of a CUDA toolkit that can compile and link, or None.

    The nvcc on PATH may be a script that calls another, so a folder counts only with headers and
    the static runtime in it.
    """
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = shutil.which("nvcc")
    around = [Path(found).resolve().parents[1]] if found else []
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in [*(Path(n) for n in named if n), *around, *usual]:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            if runtime_library(home):
                return home
    return None


def runtime_library(home: Path) -> Path | None:
    """Return libcudart_static.a of a toolkit."""
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    return next((p for f in folders if (p := f / "libcudart_static.a").exists()), None)


def wanted() -> Path | None:
    """Return the toolkit to compile with, as ``LIAR_CUDA`` says."""
    mode = os.environ.get("LIAR_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"LIAR_CUDA must be auto, 0 or 1, got {mode!r}")
    home = None if mode == "0" else find_toolkit()
    if mode == "1" and home is None:
        raise RuntimeError(
            "LIAR_CUDA=1: no CUDA toolkit with nvcc, headers and libcudart_static.a was found; set "
            "CUDA_HOME to one, or LIAR_CUDA=0 to build without"
        )
    return home


def known(home: Path) -> set[str]:
    """Return the architectures that a toolkit compiles for, as ``compute_80``."""
    command = [home / "bin" / "nvcc", "--list-gpu-arch"]
    done = subprocess.run(command, capture_output=True, text=True)
    return set(re.findall(r"compute_\d+", done.stdout))


def archs(home: Path) -> str:
    """Return the compute capabilities to compile for, such as ``8.0+PTX, 9.0``.

    Those of LIAR_CUDA_ARCHS as they are; of the usual ones those that the toolkit knows.
    """
    asked = os.environ.get("LIAR_CUDA_ARCHS")
    if asked:
        return ", ".join(re.split("[; ]+", asked.strip("; ")))
    has = known(home)
    return ", ".join(e for e in ARCHS.split(";") if not has or f"compute_{_number(e)}" in has)


def _number(entry: str) -> str:
    return entry.removesuffix("+PTX").replace(".", "")


def code_flags(home: Path) -> list[str]:
    """Return nvcc's -gencode flags for them."""
    flags = []
    for entry in archs(home).split(", "):
        number = _number(entry)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def nvcc(home: Path, source: Path, target: Path) -> None:
    """Compile one file; what ptxas says of its kernels goes into a file beside the object."""
    command = [home / "bin" / "nvcc", *FLAGS, *code_flags(home), "-c", source, "-o", target]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source.name}:\n{result.stderr}")
    report(target).write_text(result.stdout + result.stderr)


def report(target: Path) -> Path:
    """Return where ptxas's words on an object are."""
    return target.with_suffix(".txt")


def compile_kernels(home: Path, output: Path = HERE.parents[1] / "build" / "cuda") -> list[Path]:
    """Compile every .cu that is out of date, and return the objects.

    Each toolkit and list of architectures has a folder of its own under ``output``.
    """
    made_by = " ".join([str(home.resolve()), *FLAGS, *code_flags(home)])
    output /= hashlib.sha256(made_by.encode()).hexdigest()[:12]
    output.mkdir(parents=True, exist_ok=True)
    headers = [*HERE.glob("*.h"), *HERE.glob("*.cuh"), *HERE.glob("kernels/*.cuh")]
    newest = max(p.stat().st_mtime for p in [*headers, Path(__file__)])

    def one(source: Path) -> Path:
        target = output / f"{source.stem}.o"
        done = report(target)  # written last
        if not done.exists() or done.stat().st_mtime <= max(newest, source.stat().st_mtime):
            done.unlink(missing_ok=True)
            nvcc(home, source, target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(one, sorted(HERE.glob("*.cu"))))


def link_flags(home: Path) -> list[str]:
    """Return the static CUDA runtime and what it needs."""
    return [str(runtime_library(home)), "-ldl", "-lrt", "-lpthread"]
