"""Without the compiled extension, plain torch does the same work, after one warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import summed, sums

from liar_ext.ops import dispatch, reference

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CHILD = """
import sys, warnings
sys.modules["liar_ext._C"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    from liar_ext import ops
    assert not said, said
    sums = [torch.zeros(s, dtype=torch.float64) for s in ((3, 3), (3,), (2,))]
    for _ in range(2):
        ops.gram_update_(*sums, torch.ones(5, 3))
    ops.obs_curve(torch.eye(3), torch.eye(3), 1, 0.1, 0)
print(sums[0].tolist(), len(said), said[0].category.__name__, said[0].message)
print(ops.build_info()["extension"], ops.build_info()["cpu_kernel"])
try:
    ops.gram_update_(*sums, torch.ones(5, 4))
except RuntimeError as error:
    print(error)
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_torch_does_the_work_after_one_warning():
    done = run("-c", CHILD)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("[[10.0, 0.0, 0.0], [10.0, 10.0, 0.0], [10.0, 10.0, 10.0]] 1 Runtime")
    assert "pip install --no-build-isolation ." in first and "docs/install.md" in first
    assert second.startswith("not in use: ") and second.endswith(" torch")
    assert third.startswith("gram_update_: x must be (tokens, 3), got (5, 4)")


@pytest.mark.exhaustive
def test_the_tests_of_the_operators_pass():
    if dispatch.MISSING:
        pytest.skip("they run without it anyway")
    names = ("written", "ops_gram", "ops", "ops_reconstruct", "ops_obs_curve", "finite", "limits")
    files = (str(HERE / f"test_{name}.py") for name in names)
    chosen = ["-m", "not exhaustive", "-p", "no:cacheprovider", *files]
    done = run("-m", "pytest", *chosen, LIAR_REFERENCE="1")
    assert done.returncode == 0, done.stdout[-3000:]


def test_schemas_are_those_of_the_extension():
    written = (CSRC / "register.cpp").read_text("utf-8")
    calls = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", written)
    compiled = {"".join(re.findall(r'"([^"]*)"', call)) for call in calls}
    public = {schema for schema in compiled if not schema.startswith("_")}
    assert set(dispatch.SCHEMAS) == public - {"build_info() -> str"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_panels_and_chunks_add_up(dtype, monkeypatch):
    """Many panels and many chunks give what one of each gives, and leave the rest alone."""
    x = torch.randn(700, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = (x.double().mT @ x.double()).tril()
    monkeypatch.setattr(reference, "PANEL", 7)
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(reference, "FLUSH_TOKENS", 128)
    above = torch.ones(50, 50, dtype=torch.bool).triu(1)
    gram, total, count = sums(50)
    gram[above] = torch.nan
    reference.gram_update_(gram, total, count, x)
    assert gram[above].isnan().all()
    bound = 1e-13 if dtype == torch.float64 else 2.0**-20
    assert (gram.tril().nan_to_num() - exact).abs().max() <= bound * 700
    torch.testing.assert_close(total, x.double().sum(0), rtol=1e-12, atol=1e-12)


def test_half_precision_products_in_float32_where_torch_has_them(monkeypatch):
    """As on CUDA, which this stands for: rows stay narrow, and sums come out in float32."""
    seen, addmm = [], torch.addmm

    def wide(product, left, right, out_dtype=None):
        seen.append((left.dtype, out_dtype, left.shape[1]))
        return addmm(product, left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(reference.torch, "addmm", wide)
    reference.multiplies_into_float32.cache_clear()
    try:
        x = torch.randn(1100, 20).bfloat16()
        found = summed(reference.gram_update_, x, None, torch.arange(1100) % 3 > 0)
        use = x[torch.arange(1100) % 3 > 0].double()
        torch.testing.assert_close(found[0], (use.mT @ use).tril(), rtol=1e-4, atol=1e-4)
        rows = [tokens for dtype, out, tokens in seen[1:]]
        assert rows == [512, 512, 76]
        assert {(dtype, out) for dtype, out, _ in seen} == {(torch.bfloat16, torch.float32)}
    finally:
        reference.multiplies_into_float32.cache_clear()


def test_what_autograd_must_know_is_told():
    written = sums(3)
    versions = [one._version for one in written]
    dispatch.check_gram_update(*written, torch.ones(5, 3))
    assert all(one._version > old for one, old in zip(written, versions, strict=True))
