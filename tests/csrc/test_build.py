"""The build: one binary for every Python and torch, and kernels that run without torch."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from covers import slow

from liar_ext import _C

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))


def test_extension_is_abi3():
    assert Path(_C.__file__).name == "_C.abi3.so"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_extension_asks_torch_for_c_functions_only():
    """Nothing of libtorch's unstable C++: such a symbol would tie the binary to one version."""
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    wanted = [line.split()[-1] for line in output.splitlines()]
    assert not [name for name in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
    # Python's stable ABI: no private function.
    assert not [name for name in wanted if name.startswith("_Py") and "_Py_" not in name]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_binary_keeps_to_both_stable_abis():
    """And needs no newer torch than the target that setup.py names."""
    from torch_abi_audit import inspect_extension

    found = inspect_extension(Path(_C.__file__))
    assert found.torch.stable and found.cpython.compliant, found
    target = re.search(r'^TORCH_TARGET = "0x(..)(..)', (ROOT / "setup.py").read_text(), re.M)
    oldest = tuple(int(part, 16) for part in target.groups())
    assert tuple(map(int, found.torch.min_torch_version.split(".")[:2])) <= oldest


def test_module_declares_that_it_needs_no_gil():
    """From Python 3.13 on, which knows the slot; an older one refuses a module that has it."""

    class Slot(ctypes.Structure):
        _fields_ = (("number", ctypes.c_int), ("value", ctypes.c_void_p))

    initialise = ctypes.PyDLL(_C.__file__).PyInit__C
    initialise.restype = ctypes.c_void_p
    # PyModuleDef: an object's head, m_init, m_index, m_copy, m_name, m_doc, m_size, m_methods.
    pointers = object.__basicsize__ // ctypes.sizeof(ctypes.c_void_p) + 7
    slots = ctypes.cast(initialise(), ctypes.POINTER(ctypes.POINTER(Slot)))[pointers]
    declared = (slots[0].number, slots[0].value)
    assert declared == (4, 1) if sys.version_info >= (3, 13) else declared[0] == 0


def torch_headers(text):
    return re.findall(r"#\s*include\s*[<\"](?:torch|ATen|c10)/", text)


def test_kernels_include_no_torch_header():
    """Of both devices: bare nvcc compiles them, and the native tests run them without torch."""
    kernels = [p for p in SOURCES if CSRC / "cpu" in p.parents or CSRC / "cuda" in p.parents]
    assert {path.suffix for path in kernels} == {".cpp", ".h", ".cu", ".cuh"}
    for path in kernels:
        assert not torch_headers(path.read_text(encoding="utf-8")), path
    launchers = CSRC / "launchers" / "check.h"
    assert torch_headers(launchers.read_text(encoding="utf-8"))  # so this can fail


def test_no_unstable_header_of_torch():
    """The one that everybody includes costs half a minute a file and ties it to one torch."""
    for path in SOURCES:
        assert "torch/extension.h" not in path.read_text(encoding="utf-8"), path


def test_wide_vectors_stay_in_their_own_units():
    """Only the units that are compiled for an instruction set may name it."""
    for path in SOURCES:
        if "immintrin.h" in path.read_text(encoding="utf-8"):
            assert re.match(r"(kernels|simd)_avx", path.name), path


@pytest.mark.parametrize(
    ("mode", "compiler", "code", "words"),
    [
        ("auto", "/nowhere/c++", 0, "installing without the compiled extension; torch will do"),
        ("require", "/nowhere/c++", 1, "LIAR_EXTENSION=require: there is no C++ compiler"),
        slow("require", "false", 1, "LIAR_EXTENSION=require: false fails"),
        slow("off", "/nowhere/c++", 0, ""),
        ("yes", "c++", 1, "LIAR_EXTENSION must be auto, require or off, got 'yes'"),
    ],
)
def test_a_machine_without_a_compiler(mode, compiler, code, words, tmp_path):
    """What setup.py builds there is for every platform."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"LIAR_EXTENSION": mode, "CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and words in done.stderr, done.stderr
    if code == 0:
        assert (tmp_path / "lib" / "liar_ext" / "ops" / "reference.py").exists()
        assert not list(tmp_path.rglob("_C*"))


def test_architectures_are_those_that_the_toolkit_knows(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("cuda_build", CSRC / "cuda" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.delenv("LIAR_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(build, "known", lambda home: {"compute_80", "compute_86", "compute_90"})
    assert build.archs(tmp_path) == "8.0+PTX, 8.6, 9.0"
    assert "-gencode=arch=compute_80,code=compute_80" in build.code_flags(tmp_path)
    assert not re.search(r"\da\b", build.ARCHS)  # code for one chip alone
    monkeypatch.setenv("LIAR_CUDA_ARCHS", "9.0a")
    assert build.archs(tmp_path) == "9.0a"
