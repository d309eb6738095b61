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


@pytest.mark.parametrize(("width", "units"), [(2, 65536), (65536, 2)])
def test_more_units_than_a_grid_is_high_are_refused(width, units):
    d = width * units
    weight, gram = torch.ones(1, 1).expand(1, d), torch.zeros(1, 1).expand(d, d)
    with pytest.raises(RuntimeError, match=r"obs_curve: units .* at most 65535.* to the CPU"):
        call("obs_curve", weight, gram, width, 0.1, 0, 1)


def test_sums_that_overlap_themselves_are_refused():
    gram = torch.zeros(1, 4).expand(4, 4)
    total, count = torch.zeros(4), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gram_update_: gram .* rows that do not overlap"):
        call("gram_update_", gram, total, count, torch.ones(3, 4))
