"""The build: one binary for every Python and torch, and kernels that run without torch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from liar_ext import _C

ROOT = Path(__file__).parents[2]
CPU_ONLY = ("-DLIAR_CUDA=OFF", "-DLIAR_HOST_KERNELS=OFF")  # other tests compile and run these
SOURCES = sorted((ROOT / "csrc").rglob("*.cpp")) + sorted((ROOT / "csrc").rglob("*.h"))


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


def test_kernels_include_no_torch_header():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch/extension.h" not in text, path
        if path.parent in (ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda" / "kernels"):
            assert not re.search(r"#include [<\"](torch|ATen|c10)/", text), path


def test_wide_vectors_stay_in_their_own_units():
    """Only the units that are compiled for an instruction set may name it."""
    for path in SOURCES:
        if "immintrin.h" in path.read_text(encoding="utf-8"):
            assert re.match(r"(kernels|simd)_avx", path.name), path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_native_kernels_under_sanitizers(tmp_path):
    """All kernel paths of this machine under AddressSanitizer and UndefinedBehaviorSanitizer."""
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DLIAR_SANITIZE=address", *CPU_ONLY],
        ["cmake", "--build", str(tmp_path), "-j", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "compile_commands.json").exists()


def test_a_missing_extension_says_what_to_run():
    code = "import sys; sys.modules['liar_ext._C'] = None; import liar_ext.ops"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install --no-build-isolation -e ." in result.stderr
