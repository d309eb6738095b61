"""Build the kernels for the host: `python csrc/testing/build.py [--sanitize] [--output DIR]`.

Writes `liar_host_kernels`, a pybind11 module, and prints its path. Nothing is rebuilt that is
newer than every source.
"""

import argparse
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> str:
    """Return the C++ compiler of this machine."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        raise RuntimeError("building the host kernels needs a C++17 compiler; set CXX")
    return found


def build(output: Path, sanitize: bool = False, jobs: int | None = None) -> Path:
    """Compile what is out of date and return the module's path."""
    import pybind11

    output.mkdir(parents=True, exist_ok=True)
    module = output / f"liar_host_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = [*HERE.glob("*.h"), *(HERE.parent / "cuda" / "kernels").glob("*.cuh")]
    newest = max(p.stat().st_mtime for p in [*headers, Path(__file__)])
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *(["-O1", "-g", *SANITIZE] if sanitize else ["-O2"]), *includes]

    def compile_one(source: Path) -> Path:
        target = output / f"{source.stem}.o"
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            return target
        subprocess.run([compiler(), *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(compile_one, sorted(HERE.glob("bind_*.cpp"))))
    if not module.exists() or module.stat().st_mtime < max(p.stat().st_mtime for p in objects):
        link = SANITIZE if sanitize else []
        command = [compiler(), "-shared", *link, *objects, "-o", module]
        subprocess.run(command, check=True)
    return module


def preload() -> str:
    """Return what `LD_PRELOAD` must name for the sanitized module to load into Python."""
    libraries = ("libasan.so", "libstdc++.so")  # the second so that exceptions are intercepted
    ask = [[compiler(), f"-print-file-name={name}"] for name in libraries]
    return ":".join(subprocess.check_output(a, text=True).strip() for a in ask)


def main() -> None:
    """Build and print the path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="with address and UB sanitizers")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--preload", action="store_true", help="print LD_PRELOAD and build nothing")
    arguments = parser.parse_args()
    if arguments.preload:
        print(preload())
        return
    kind = "sanitized" if arguments.sanitize else "plain"
    output = arguments.output or HERE.parents[1] / "build" / "host_kernels" / kind
    print(build(output, arguments.sanitize))


if __name__ == "__main__":
    main()
