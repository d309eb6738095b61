"""Compile csrc for systems that are not at hand: `python csrc/testing/cross.py`.

Uses zig's clang, `pip install ziglang`, with the headers that it has of each system. The CPU
kernels, the operators and their launchers become objects; nothing is linked, and nothing runs.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent
TARGETS = ("aarch64-linux-gnu", "aarch64-macos", "x86_64-windows-gnu")
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fno-sanitize=all"]
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
BUILD = ['-DLIAR_COMPILER="zig"', "-DPy_LIMITED_API=0x030A0000"]


def sources(target: str) -> list[Path]:
    """Return the units that setup.py compiles on a system."""
    found = [*CSRC.glob("cpu/*.cpp"), *CSRC.glob("launchers/cpu/*.cpp"), CSRC / "register.cpp"]
    wide = target.startswith("x86_64")
    return sorted(p for p in found if wide or not p.name.startswith("kernels_avx"))


def flags_of(source: Path) -> list[str]:
    """Return the instruction sets of a unit, as setup.py gives them."""
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    return {
        "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "kernels_avx512.cpp": avx512,
        "kernels_avx512_bf16.cpp": [*avx512, "-mavx512bf16"],
    }.get(source.name, [])


def compile_one(target: str, source: Path, folder: Path) -> str:
    """Compile a unit; return what the compiler says if it fails or warns."""
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    includes.append(f"-isystem{sysconfig.get_paths()['include']}")
    command = [sys.executable, "-m", "ziglang", "c++", f"--target={target}", *FLAGS, *STABLE]
    command += [*BUILD, *includes, *flags_of(source), "-c", str(source)]
    command += ["-o", str(folder / f"{target}-{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{target}: {source.name}:\n{done.stderr[-2000:]}" if done.returncode else ""


def main() -> int:
    """Compile everything for every target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("ziglang") is None:
        print("cross: ziglang is missing; pip install ziglang")
        return 1
    work = [(target, source) for target in arguments.targets for source in sources(target)]
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            said = list(pool.map(lambda one: compile_one(*one, Path(folder)), work))
    wrong = [one for one in said if one]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"cross: {len(work)} units for {', '.join(arguments.targets)}, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
