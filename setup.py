"""Build csrc/ into liar_ext/_C.abi3.so over the LibTorch Stable ABI.

One library serves every Python from 3.10 and every torch from TORCH_TARGET on, so nothing here
depends on either; only a free-threaded Python, which has no stable ABI, needs a library of its own.
CXX, CPPFLAGS, CFLAGS, CXXFLAGS and LDFLAGS are obeyed. Metadata is in pyproject.toml.
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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
}


class Build(BuildExtension):
    """BuildExtension that gives the kernels of each instruction set their own flags."""

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
        if CUDA_HOME:
            ext.extra_objects += [str(path) for path in cuda.compile_kernels(CUDA_HOME)]
            ext.extra_link_args += cuda.link_flags(CUDA_HOME)
        super().build_extension(ext)


def compiler_name():
    """First line of the compiler's version, for `liar info`."""
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

# Its own file, because the check of the compiled kernels uses it too.
spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
CUDA_HOME = cuda.wanted()
if CUDA_HOME:
    FOLDERS.append("csrc/launchers/cuda")
sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.cpp"))]

setup(
    ext_modules=[
        CppExtension(
            "liar_ext._C",
            [str(p.relative_to(ROOT)) for p in sources if p.name not in KERNEL_FLAGS],
            extra_compile_args=[
                *COMMON,
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
                "-DTORCH_STABLE_ONLY",  # torch's other headers then stop the build
                f'-DLIAR_COMPILER="{compiler_name()}"',
                *(["-DLIAR_WITH_CUDA", f'-DLIAR_CUDA_ARCHS="{cuda.archs()}"'] if CUDA_HOME else []),
                *USER_FLAGS,
            ],
            py_limited_api=STABLE_PYTHON,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_PYTHON else {},
)
