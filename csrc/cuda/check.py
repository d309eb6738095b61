"""Check the compiled kernels without a GPU: `python csrc/cuda/check.py [--write]`.

Compiles every kernel for every architecture, or takes what setup.py has compiled. Fails on a spill,
on local memory, on shared memory that no launch knows of, on a kernel whose machine code lacks its
tensor-core instruction or its 16-byte copies, on a product that adds to its sums one by one, and on
code that runs on one chip alone without an instruction of that chip.
`--write` puts the table of registers into docs/cuda.md; without it, a table that differs is a
failure too. The table is that of the compiler it names, so another one only has its rules checked.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import build  # noqa: E402  the file beside this one

DOCS = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- table: make cuda-check -->", "<!-- end of table -->"

# What the machine code of a kernel must hold, by a part of its name.
MUST = {
    "product_kernel<MmaHalf<bf16>": [
        "HMMA.16816.F32.BF16",
        "LDSM.16.MT88.4",
        "LDGSTS.E.BYPASS.128",
    ],
    "product_kernel<MmaHalf<f16>": ["HMMA.16816.F32 ", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"],
    "product_kernel<MmaTf32": ["HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128"],
    "product_kernel<MmaF64": ["DMMA", "LDGSTS.E.BYPASS.128"],
    "scan_rows_kernel": ["LDG.E.128"],
    "small_kernel": ["DFMA"],
}
LOCAL = re.compile(r"\b(LDL|STL)\b")
# Old values that a product's epilogue must ask for before it needs the first. A compiler moves no
# load over a store that may alias, and a warp with one load on its way waits for memory each time.
IN_FLIGHT = 8
LOAD = re.compile(r"\bLDG\.E(?:\.64)? (R\d+),")
# What an architecture with an `a` or an `f` has and the plain one has not: wgmma and setmaxnreg of
# Hopper, the tensor memory of Blackwell. Code for it runs on that chip, or its family, alone.
OWN = re.compile(r"\b(HGMMA|IGMMA|QGMMA|BGMMA|USETMAXREG|UTC\w*MMA|UTCBAR|LDTM|STTM|UTCCP)\b")


def plain(symbols: list[str]) -> list[str]:
    """Demangle, and drop namespaces, parameters and enum casts."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [n.replace("liar::cuda::", "").removeprefix("void ") for n in names]
    return [n.split("(")[0] if "<" not in n.split("(")[0] else n[: n.rfind("(")] for n in names]


def resources(text: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Return (registers, spilled bytes, static shared bytes) by (kernel, architecture)."""
    found, key, spilled = {}, None, 0
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            key = m.groups()
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            spilled = sum(map(int, m.groups()))
        elif (m := re.search(r"Used (\d+) registers", line)) and key:
            shared = re.search(r"(\d+) bytes smem", line)
            found[key] = int(m[1]), spilled, int(shared[1]) if shared else 0
    return found


def machine_code(home: Path, target: Path) -> dict[tuple[str, str], str]:
    """Return the disassembly by (kernel, architecture)."""
    tools = [home / "bin", *Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin")]
    path = os.pathsep.join([*map(str, tools), os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=path)
    if not tool or not shutil.which("nvdisasm", path=path):
        raise RuntimeError(
            "cuda-check: cuobjdump and nvdisasm are missing; pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm"
        )
    environment = os.environ | {"PATH": path}
    text = subprocess.run(
        [tool, "-sass", target], capture_output=True, text=True, check=True, env=environment
    ).stdout
    code, arch, key = defaultdict(list), "", None
    for line in text.splitlines():
        if m := re.match(r"\s*arch = (\S+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function : (\S+)", line):
            key = m[1], arch
        elif key and "/*" in line:
            code[key].append(line)
    return {k: "\n".join(v) for k, v in code.items()}


def loads_in_flight(code: str) -> int:
    """Return the most loads of sums that are issued before one of their values is read."""
    waiting: set[str] = set()
    most = 0
    for line in code.splitlines():
        instruction = line.split("*/", 1)[-1].split(";")[0]
        if match := LOAD.search(instruction):
            waiting.add(match[1])
            most = max(most, len(waiting))
        elif waiting & set(re.findall(r"\bR\d+\b", instruction)):
            waiting.clear()
    return most


def faults(name: str, arch: str, numbers: tuple[int, int, int], code: str) -> list[str]:
    """Return what is wrong with one kernel on one architecture."""
    wrong = []
    if numbers[1]:
        wrong.append(f"{numbers[1]} bytes of stack and spills")
    if LOCAL.search(code):
        wrong.append("local memory traffic")
    if numbers[2]:
        wrong.append(f"{numbers[2]} bytes of static shared memory")
    if not code:
        wrong.append("no machine code")
    for part, needed in MUST.items():
        if name.startswith(part):
            wrong += [f"no {n.strip()}" for n in needed if n not in code]
    if name.startswith("product_kernel") and (most := loads_in_flight(code)) < IN_FLIGHT:
        wrong.append(f"{most} loads in flight in its epilogue, fewer than {IN_FLIGHT}")
    return [f"{name} on {arch}: {w}" for w in wrong]


def needless(code: dict[str, str]) -> list[str]:
    """Return architectures of one chip, or family, no kernel of which has an instruction of it."""
    return [
        f"{arch}: no kernel needs it, {arch.rstrip('af')} runs on later chips too"
        for arch, text in sorted(code.items())
        if arch[-1] in "af" and not OWN.search(text)
    ]


def unmatched(names: set[str]) -> list[str]:
    """Return the rules that no kernel falls under, as after a renaming."""
    return [f"no kernel is called {p}" for p in MUST if not any(n.startswith(p) for n in names)]


def table(found: dict[tuple[str, str], tuple[int, int, int]], compiler: str) -> str:
    """Return registers per thread as a Markdown table."""
    archs = sorted({a for _, a in found}, key=lambda a: int(re.sub(r"\D", "", a)))
    halves = [archs[: len(archs) // 2], archs[len(archs) // 2 :]]
    lines = [
        f"Registers a thread, by {compiler}; no kernel spills or uses local memory.",
        "",
        "| kernel | " + " | ".join(", ".join(some) for some in halves) + " |",
        "|---|---|---|",
    ]
    for kernel in sorted({k for k, _ in found}):
        cells = [
            ", ".join(str(found[kernel, a][0]) if (kernel, a) in found else "–" for a in some)
            for some in halves
        ]
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Compile, check, and compare or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/cuda.md")
    arguments = parser.parse_args()
    home = build.find_toolkit()
    if home is None:
        print("cuda-check: no CUDA toolkit here, nothing checked")
        return 0
    objects = build.compile_kernels(home)
    version = subprocess.check_output([home / "bin" / "nvcc", "--version"], text=True)
    compiler = "nvcc " + re.search(r"release [\d.]+, V([\d.]+)", version)[1]

    found, wrong, whole = {}, [], defaultdict(str)
    for target in objects:
        numbers = resources(build.report(target).read_text())
        code = machine_code(home, target)
        symbols = [symbol for symbol, _ in numbers]
        for (key, value), name in zip(numbers.items(), plain(symbols), strict=True):
            found[name, key[1]] = value
            wrong += faults(name, key[1], value, code.get(key, ""))
            whole[key[1]] += code.get(key, "")
    wrong += unmatched({name for name, _ in found}) + needless(whole)
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    new = f"\n\n{table(found, compiler)}\n\n"
    if arguments.write:
        DOCS.write_text(before + BEGIN + new + END + after)
    elif f"by {compiler};" in old and old != new:
        wrong.append("docs/cuda.md: its table is not that of these kernels; run with --write")
    for line in wrong:
        print(f"cuda-check: {line}")
    print(f"cuda-check: {len(found)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
