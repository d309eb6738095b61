"""Build the kernels for the host: `python csrc/testing/build.py [--sanitize] [--output DIR]`.

Writes `liar_host_kernels`, a pybind11 module, and prints its path. `--simulate` writes instead the
simulated GPU of simulated_gpu.cpp and the launchers on it. Nothing is rebuilt that is newer than
every source. One process at a time builds in a folder.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = HERE.parent / "cuda"
LAUNCHERS = HERE.parent / "launchers" / "cuda"
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


def run(*arguments: str | Path) -> None:
    """Run the compiler."""
    subprocess.run([compiler(), *arguments], check=True)


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Wait until no other process builds in the folder, and keep others out meanwhile."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however that ends
        yield


def compile_all(sources: Sequence[Path], output: Path, flags: Sequence[str]) -> list[Path]:
    """Compile what is older than its source or any header, and return the objects."""
    output.mkdir(parents=True, exist_ok=True)
    headers = [p for suffix in ("h", "cuh") for p in (ROOT / "csrc").rglob(f"*.{suffix}")]
    newest = max(p.stat().st_mtime for p in [*headers, Path(__file__)])

    def compile_one(source: Path) -> Path:
        target = output / f"{source.name}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            run(*flags, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: Sequence[Path], target: Path, flags: Sequence[str] = ()) -> Path:
    """Link a shared library, unless it is newer than its objects, and return its path."""
    if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in objects):
        run("-shared", *objects, *flags, "-o", target)
    return target


def build(output: Path, sanitize: bool = False) -> Path:
    """Return the path of the module, built if it is out of date."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *(["-O1", "-g", *SANITIZE] if sanitize else ["-O2"]), *includes]
    module = output / f"liar_host_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    with alone(output):
        objects = compile_all(sorted(HERE.glob("bind_*.cpp")), output, flags)
        return link(objects, module, SANITIZE if sanitize else [])


def simulate(output: Path) -> tuple[Path, Path]:
    """Return the paths of the simulated GPU and of the launchers, built if they are out of date."""
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    folder = cpp_extension.library_paths()[0]
    torch = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10"]
    flags = [*FLAGS, "-O2", *includes]
    launchers = [HERE / "simulated_launchers.cpp", *LAUNCHERS.glob("*.cpp"), *CUDA.glob("*.cu")]
    target = re.search(r'^TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    stable = [f"-DTORCH_TARGET_VERSION={target[1]}"]
    with alone(output):
        device = compile_all([HERE / "simulated_gpu.cpp"], output, [*flags, "-std=c++20"])
        device = link(device, output / "libtorch_cuda.so", [*torch, "-Wl,-soname,libtorch_cuda.so"])
        objects = compile_all(sorted(launchers), output / "launchers", [*flags, *stable])
        found = [str(device), *torch, f"-Wl,-rpath,{output}"]
        return device, link(objects, output / "liar_simulated_launchers.so", found)


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
    parser.add_argument("--simulate", action="store_true", help="the simulated GPU instead")
    arguments = parser.parse_args()
    if arguments.preload:
        print(preload())
        return
    if arguments.simulate:
        print(*simulate(arguments.output or ROOT / "build" / "simulated_gpu"), sep="\n")
        return
    kind = "sanitized" if arguments.sanitize else "plain"
    print(build(arguments.output or ROOT / "build" / "host_kernels" / kind, arguments.sanitize))


if __name__ == "__main__":
    main()
