"""Compile csrc for systems that are not at hand: `python csrc/testing/cross.py`.

Uses zig's clang, `pip install ziglang`, with the headers that it has of each system. The CPU
kernels, the operators and their launchers become objects. Where qemu-user is (the Debian package
qemu-user-static), the native tests are linked for aarch64 Linux and run by it: minutes.
"""

import argparse
import importlib.util
import os
import shutil
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


AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
X86 = {  # units of x86-64 alone, and their instruction sets, as setup.py gives them
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": AVX512,
    "kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "kernels_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}


def sources(target: str) -> list[Path]:
    """Return the units that setup.py compiles on a system."""
    found = [*CSRC.glob("cpu/*.cpp"), *CSRC.glob("launchers/cpu/*.cpp"), CSRC / "register.cpp"]
    return sorted(p for p in found if target.startswith("x86_64") or p.name not in X86)


def compile_one(target: str, source: Path, folder: Path) -> str:
    """Compile a unit; return what the compiler says if it fails or warns."""
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    includes.append(f"-isystem{sysconfig.get_paths()['include']}")
    command = [sys.executable, "-m", "ziglang", "c++", f"--target={target}", *FLAGS, *STABLE]
    command += [*BUILD, *includes, *X86.get(source.name, []), "-c", str(source)]
    command += ["-o", str(folder / f"{target}-{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{target}: {source.name}:\n{done.stderr[-2000:]}" if done.returncode else ""


def emulated() -> str:
    """Run the native tests of every aarch64 kernel; return what fails, or nothing."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        print("cross: no qemu-aarch64 here, nothing was run")
        return ""
    units = [p for p in sources("aarch64") if p.parent == CSRC / "cpu"]
    units += sorted((CSRC.parent / "tests" / "native").glob("*.cpp"))
    command = [sys.executable, "-m", "ziglang", "c++", "--target=aarch64-linux-musl", "-static"]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "test_kernels")
        linked = subprocess.run(
            [*command, *FLAGS, f"-I{CSRC}", *map(str, units), "-o", str(program)],
            capture_output=True,
            text=True,
        )
        if linked.returncode:
            return linked.stderr[-2000:]
        for kernel in ("neon", "portable"):
            environment = os.environ | {"LIAR_CPU_KERNEL": kernel}
            command = [qemu, str(program)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                return f"aarch64 {kernel}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            print(f"cross: aarch64 {kernel} under qemu: all right")
    return ""


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
    wrong = [one for one in (*said, emulated()) if one]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"cross: {len(work)} units for {', '.join(arguments.targets)}, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
