"""What the CUDA launchers refuse, past torch's choice by device and on any machine."""

import pytest
import torch

from liar_ext import ops

pytestmark = pytest.mark.skipif(
    ops.build_info()["cuda"] != "compiled", reason="built without CUDA kernels"
)


def call(op, *arguments):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.liar_ext, op).default.redispatch(keys, *arguments)


def test_sums_that_overlap_themselves_are_refused():
    gram = torch.zeros(1, 4).expand(4, 4)
    total, count = torch.zeros(4), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gram_update_: gram .* rows that do not overlap"):
        call("gram_update_", gram, total, count, torch.ones(3, 4))


def test_kernels_behind_the_solves_refuse_what_they_cannot_read():
    double = torch.zeros(3, 3, dtype=torch.float64)
    for block in (torch.zeros(129, 129).double(), torch.zeros(3).double(), double):
        with pytest.raises(RuntimeError, match="reconstruct: (the kernel keeps|block must be on)"):
            call("_solve_small", block, double, double[0])
