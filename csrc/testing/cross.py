"""Compile csrc for systems that are not at hand: `python csrc/testing/cross.py`.

Uses zig's clang, `pip install ziglang`, with the headers that it has of each system. The CPU
kernels, the operators and their launchers become objects. Where qemu-user is (the Debian package
qemu-user-static), the native tests are linked for aarch64 Linux and run by it: minutes.
"""

import argparse
import importlib.util
import os
import re
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


def product_loop(assembly: str) -> tuple[int, int]:
    """Return the multiply-adds and the instructions of the widest inner loop of products.

    It is the one that fetches what comes next.
    """
    lines = [line.split("//")[0].strip() for line in assembly.splitlines()]
    lines = [line for line in lines if re.match(r"[a-z]|\.LBB", line)]  # no directives
    place = {line[:-1]: k for k, line in enumerate(lines) if line.endswith(":")}
    found = [(0, 0)]
    for k, line in enumerate(lines):
        jump = re.match(r"(?:b\.\w+|cbn?z\s+\w+,)\s*(\S+)", line)
        if jump and place.get(jump[1], k) < k:
            body = [each for each in lines[place[jump[1]] : k + 1] if not each.endswith(":")]
            inner = not any(re.match(r"b\.|cb|tb", each) for each in body[:-1])
            if inner and any(each.startswith("prfm") for each in body):
                found.append((sum(each.startswith("fmla") for each in body), -len(body)))
    multiplied, issued = max(found)
    return multiplied, -issued


def count_instructions() -> None:
    """Print what the products of the aarch64 kernels issue for their multiply-adds."""
    command = [sys.executable, "-m", "ziglang", "c++", "--target=aarch64-linux-musl", *FLAGS]
    for kernel in ("neon", "portable"):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "kernels.s")
            source = CSRC / "cpu" / f"kernels_{kernel}.cpp"
            made = [*command, "-O3", "-g0", "-S", "-o", str(target), str(source)]
            subprocess.run(made, capture_output=True, check=True)
            multiplied, issued = product_loop(target.read_text(encoding="utf-8"))
        print(f"cross: aarch64 {kernel}: {multiplied} multiply-adds in {issued} instructions")


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
    count_instructions()
    wrong = [one for one in (*said, emulated()) if one]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"cross: {len(work)} units for {', '.join(arguments.targets)}, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
