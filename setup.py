"""Build csrc/ into liar_ext/_C.abi3.so over the LibTorch Stable ABI.

One library serves every Python from 3.10 and every torch from TORCH_TARGET on, so nothing here
depends on either; only a free-threaded Python, which has no stable ABI, needs a library of its own.
CXX, CPPFLAGS, CFLAGS, CXXFLAGS and LDFLAGS are obeyed. Metadata is in pyproject.toml.

LIAR_EXTENSION is ``auto`` (where it can't be compiled the package is installed without, and torch
does its work), ``require`` (that is an error) or ``off`` (a wheel for every platform).
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # torch 2.10
STABLE_PYTHON = not sysconfig.get_config_var("Py_GIL_DISABLED")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# Last in every command: setuptools puts them first, and nowhere where this file compiles itself.
USER_FLAGS = [
    flag for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS") for flag in shlex.split(os.getenv(name, ""))
]

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# One unit per instruction set; which one runs is decided on the user's CPU.
KERNEL_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": AVX512,
    "kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "kernels_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}


MODE = os.environ.get("LIAR_EXTENSION", "auto").lower()
if MODE not in ("auto", "require", "off"):
    raise SystemExit(f"LIAR_EXTENSION must be auto, require or off, got {MODE!r}")


def missing():
    """Return what the extension can't be compiled for want of, or nothing."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <string>\nint liar(std::string text) { return text.size(); }\n")
        shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared"]
        command = [*COMPILER, "-std=c++17", "-fPIC", *shared, str(source), "-o", f"{source}.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"there is no C++ compiler: {error}; install one, or name it by CXX"
        return done.returncode and f"{shlex.join(COMPILER)} fails: {done.stderr.strip()[-300:]}"


def without(why):
    """Go on without the extension, where that is allowed."""
    if MODE == "require":
        raise SystemExit(f"LIAR_EXTENSION=require: {why}")
    print(
        f"liar_ext: installing without the compiled extension; torch will do its work, slower. "
        f"{why}",
        file=sys.stderr,
    )


def compiler_name():
    """First line of the compiler's version, for `liar doctor`."""
    try:
        command = [*COMPILER, "--version"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return text.splitlines()[0].replace('"', "")
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


COMMON = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-g0",
]
FOLDERS = ["csrc", "csrc/cpu", "csrc/launchers/cpu"]


def extension():
    """Return setup's arguments for the extension and the CUDA kernels."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # Its own file, because the check of the compiled kernels uses it too.
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda)
    home = cuda.wanted()

    class Build(BuildExtension):
        """BuildExtension that gives the kernels of each instruction set their own flags."""

        def run(self):
            """Build, or go on without."""
            try:
                super().run()
            except Exception as error:
                without(f"the build fails: {error}")

        def build_extension(self, ext):
            """Compile the kernel units first, then link them into the extension."""
            machine = platform.machine().lower()
            for name, flags in KERNEL_FLAGS.items():
                if machine not in ("x86_64", "amd64"):
                    continue
                source = ROOT / "csrc" / "cpu" / name
                target = Path(self.build_temp).resolve() / f"{name}.o"
                target.parent.mkdir(parents=True, exist_ok=True)
                command = [*COMPILER, *COMMON, *flags, *USER_FLAGS]
                self.spawn([*command, "-c", str(source), "-o", str(target)])
                ext.extra_objects.append(str(target))
            if home:
                ext.extra_objects += [str(path) for path in cuda.compile_kernels(home)]
                ext.extra_link_args += cuda.link_flags(home)
            super().build_extension(ext)

    folders = [*FOLDERS, *(["csrc/launchers/cuda"] if home else [])]
    sources = [path for folder in folders for path in sorted((ROOT / folder).glob("*.cpp"))]
    module = CppExtension(
        "liar_ext._C",
        [str(p.relative_to(ROOT)) for p in sources if p.name not in KERNEL_FLAGS],
        extra_compile_args=[
            *COMMON,
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            "-DTORCH_STABLE_ONLY",  # torch's other headers then stop the build
            f'-DLIAR_COMPILER="{compiler_name()}"',
            *(["-DLIAR_WITH_CUDA", f'-DLIAR_CUDA_ARCHS="{cuda.archs(home)}"'] if home else []),
            *USER_FLAGS,
        ],
        py_limited_api=STABLE_PYTHON,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_PYTHON else {},
    }


lacks = "" if MODE == "off" else missing()
if lacks:
    without(lacks)
setup(**({} if lacks or MODE == "off" else extension()))
