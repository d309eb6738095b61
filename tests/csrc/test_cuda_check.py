"""What `make cuda-check` refuses, on made-up compiler output, and what launches may call."""

import importlib.util
import re
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
KERNELS = sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("kernels/*.cuh")])

spec = importlib.util.spec_from_file_location("cuda_check", CUDA / "check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

PTXAS = """\
ptxas info    : Compiling entry function '{name}' for 'sm_80'
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers{shared}, 400 bytes cmem[0]
"""
LOADS = [f"/*{k:04x}*/ @!P0 LDG.E.64 R{2 * k + 20}, [R2.64] ;" for k in range(8)]
GOOD = "\n".join(
    [
        "/*0000*/ DMMA.884 R0, R4, R6, R0 ;\n/*0010*/ LDGSTS.E.BYPASS.128 [R0], [R2.64] ;",
        *LOADS,
        *(f"/*0000*/ DADD R8, R{2 * k + 20}, R6 ;" for k in range(8)),
    ]
)
# As a compiler writes it that may not move a load over the store before.
SERIAL = GOOD.splitlines()[:2] + [
    f"{load}\n/*0000*/ DADD R8, R{2 * k + 20}, R6 ;" for k, load in enumerate(LOADS)
]
NAME = "product_kernel<MmaF64>"


def faults(code=GOOD, stack=0, stores=0, shared="", name=NAME):
    numbers = check.resources(PTXAS.format(name="k", stack=stack, stores=stores, shared=shared))
    return check.faults(name, "sm_80", numbers["k", "sm_80"], code)


def test_a_sound_kernel_passes():
    assert faults() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 16}, "16 bytes of stack and spills"),
        ({"stores": 8}, "8 bytes of stack and spills"),
        ({"shared": ", 1024 bytes smem"}, "1024 bytes of static shared memory"),
        ({"code": GOOD + "\nLDL.64 R2, [R1] ;"}, "local memory traffic"),
        ({"code": GOOD + "\nSTL [R1], R2 ;"}, "local memory traffic"),
        ({"code": GOOD.replace("DMMA", "DFMA")}, "no DMMA"),
        ({"code": GOOD.replace(".128", ".64")}, "no LDGSTS.E.BYPASS.128"),
        ({"code": GOOD, "name": "product_kernel<MmaHalf<f16> >"}, "no HMMA.16816.F32"),
        ({"code": ""}, "no machine code"),
        ({"code": "\n".join(SERIAL)}, "1 loads in flight in its epilogue, fewer than 8"),
    ],
)
def test_each_regression_is_a_fault(change, message):
    assert any(message in fault for fault in faults(**change))


def test_a_rule_that_no_kernel_falls_under_is_a_fault():
    assert check.unmatched({NAME}) and not check.unmatched({f"{part} x" for part in check.MUST})


def test_code_for_one_chip_alone_needs_a_reason():
    wgmma = "/*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;"
    assert check.needless({"sm_80": GOOD, "sm_90": GOOD, "sm_90a": GOOD + wgmma}) == []
    wrong = check.needless({"sm_90a": GOOD, "sm_100f": GOOD, "sm_120": GOOD})
    assert [each.split(":")[0] for each in wrong] == ["sm_100f", "sm_90a"]
    assert "sm_90 runs on later chips too" in wrong[1]


def test_launches_neither_wait_nor_allocate():
    """Both are what a CUDA graph can't capture; these calls of the runtime are what it can."""
    allowed = {
        "cudaDeviceGetAttribute",
        "cudaDriverGetVersion",
        "cudaFuncSetAttribute",
        "cudaGetDeviceCount",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
        "cudaRuntimeGetVersion",
        "cudaSetDevice",
    }
    called = {
        name
        for path in KERNELS
        for name in re.findall(r"\b(cu(?:da)?[A-Z]\w+)\(", path.read_text(encoding="utf-8"))
    }
    assert called == allowed
    for path in KERNELS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(malloc|new|delete|free)\s*[(\[]|std::vector", text), path
