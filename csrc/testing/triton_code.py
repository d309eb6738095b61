"""Compile the Triton kernel of Gram updates without a GPU, and look at its machine code.

Fails where a kernel lacks the tensor-core instruction of its architecture, or keeps more than a few
registers in memory. Needs triton, cuobjdump and nvdisasm: `make triton`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from liar_ext.ops import gram_triton

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
HALF = {80: "HMMA.16816.F32", 90: "HGMMA.64x128x16.F32", 100: "UTCHMMA", 120: "HMMA.16816.F32"}
TF32 = {80: "HMMA.1688.F32.TF32", 90: "HGMMA.64x128x8.F32.TF32", 100: "UTCHMMA"}
TF32[120] = TF32[80]
DOUBLE = {80: "DMMA", 90: "DMMA", 100: "DMMA", 120: "DFMA"}
KINDS = {  # rows, with real weights or without: what must be in the code
    (torch.bfloat16, False): HALF,
    (torch.float16, False): HALF,
    (torch.bfloat16, True): TF32,
    (torch.float32, False): TF32,
    (torch.float64, False): DOUBLE,
}
MOST_SPILLED = 64  # bytes


def cubin(arch: int, dtype: torch.dtype, weighted: bool) -> bytes:
    """Return the machine code of a triangle's kernel, float64 sums, sizes divisible by 16."""
    kernel = gram_triton.product_kernel
    constants = gram_triton.settings(dtype, weighted)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants |= {"TRIANGLE": True, "WEIGHTED": weighted}
    types = {"x": POINTERS[dtype], "y": POINTERS[dtype], "use": "*i1"}
    types |= {"weight": "*fp64", "gram": "*fp64"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n not in constants and n != "tokens"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): value for k, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def tool(name: str, *arguments: str | Path) -> str:
    """Run a tool of CUDA, wherever it is installed."""
    found = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin")
    path = os.pathsep.join([*map(str, found), "/usr/local/cuda/bin", os.environ.get("PATH", "")])
    command = [shutil.which(name, path=path) or name, *arguments]
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def main() -> int:
    """Compile every kind for every architecture, and say what is in it."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in HALF:
            for (dtype, weighted), needed in KINDS.items():
                file = Path(folder, f"{arch}.cubin")
                file.write_bytes(cubin(arch, dtype, weighted))
                usage = tool("cuobjdump", "-res-usage", file)
                registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
                count = tool("nvdisasm", file).count(needed[arch])
                bad = count == 0 or stack > MOST_SPILLED
                wrong += bad
                what = f"{str(dtype).removeprefix('torch.')}{' weighted' * weighted}"
                print(
                    f"sm_{arch} {what}: {count} {needed[arch]}, {registers} registers, "
                    f"{stack} bytes spilled{'  WRONG' * bad}"
                )
    print(f"triton: {len(HALF) * len(KINDS)} kernels compiled, {wrong} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
