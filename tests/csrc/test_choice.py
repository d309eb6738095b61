"""Which backend an operator takes on a GPU, on the simulated one, with planted faults."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        sys.platform != "linux" or torch.backends.cuda.is_built(),
        reason="the simulation wants a build of torch for the CPU, on Linux",
    ),
]
START = """
import simulated_gpu
import os, time, warnings
from pathlib import Path
import torch
from liar_ext import ops
from dataclasses import replace
from liar_ext.system.errors import InputError
from liar_ext.ops import backends, reference
from liar_ext.ops.backends import Kind, gram_kind

del os.environ["LIAR_GRAM"], os.environ["LIAR_SOLVE"]
right = reference.gram_update_
calls = []

def wrong(gram, *rest):
    right(gram, *rest)
    if gram.shape[0] > 100:
        gram[100, 37] *= 1.0001

def slow(*arguments):
    calls.append("slow")
    time.sleep(0.05)
    right(*arguments)

def raises(*arguments):
    raise RuntimeError("no kernel image")

def drops_nothing(gram, total, count, x, y=None, weight=None):
    right(gram, total, count, x.nan_to_num(), y, weight)

def full(gram, total, count, x, y=None, weight=None):
    right(gram, total, count, x, y, weight)
    gram += gram.tril(-1).mT

def kind(dtype=torch.bfloat16, **more):
    return gram_kind(torch.device("cuda", 0), dtype, torch.float64, False, False, 64, 32)

def chooser_of(found, operator=backends.grams):
    return replace(operator, backends=lambda device: found)

def choose(operator=backends.grams, asked=kind(), **found):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chooser = chooser_of(found, operator)
        try:
            print(chooser.choose(asked), *(str(one.message)[:210] for one in said), sep=" | ")
        except RuntimeError as error:
            print(f"{type(error).__name__}: {error}")
    return chooser
"""


def script(text: str, home: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", START + dedent(text)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "XDG_CACHE_HOME": str(home)}
        | environment,
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_planted_faults(tmp_path):
    said = script(
        """
        choose(a=wrong, b=right)
        choose(a=raises, b=right)
        choose(a=drops_nothing, b=right)
        choose(a=full, b=right)
        choose(a=slow, b=right)
        choose(a=wrong, b=raises)
        """,
        tmp_path,
    )
    report = "Please report this with the output of `liar doctor"
    assert said[0].startswith("b | liar_ext: the a backend of gram_update_ is left out on cuda:0")
    assert "gram[100, 37] is" in said[0] and "is right" in said[0]
    assert said[1].startswith("b | ") and "it raises RuntimeError: no kernel image" in said[1]
    assert said[2].startswith("b | ") and " is right" in said[2]
    assert said[3].startswith("b | ") and "gram[0, 1] is" in said[3]
    assert all(report in line or "report" in line for line in said[:4])
    assert said[4] == "b"
    assert said[5] == "RuntimeError: gram_update_: no backend is right on cuda:0; use --device cpu"


def test_a_measurement_is_kept_and_a_spoilt_file_is_measured_again(tmp_path):
    said = script(
        """
        first = choose(a=slow, b=right)
        path = backends.cache_file()
        print(len(calls), *first.lines())
        calls.clear()
        choose(a=slow, b=right)
        print(len(calls))  # the check alone
        for text in ("{", "[]", '{"x": 3}', path.read_text().replace("0.0", "-0.0")):
            path.write_text(text)
            calls.clear()
            choose(a=slow, b=right)
            print(len(calls))
        choose(a=right)  # one needs no clock
        """,
        tmp_path,
    )
    assert said[0] == said[2] == said[-1].replace("a", "b") == "b"
    assert said[1].startswith("5 cuda:0 bfloat16 float64 64 × 32: b (a 5")
    assert said[3] == "1" and said[5:12:2] == ["5"] * 4
    kept = json.loads((tmp_path / "liar_ext" / "backends.json").read_text())
    ((key, times),) = kept.items()
    assert key.startswith("gram_update_ on a simulated GPU, torch ") and set(times) == {"a", "b"}


def test_a_backend_is_forced_by_name(tmp_path):
    said = script(
        """
        choose(a=slow, b=right, torch=wrong)
        os.environ["LIAR_GRAM"] = "a"
        try:
            chooser_of({"torch": right}).choose(kind())
        except InputError as error:
            print(error)
        """,
        tmp_path,
        LIAR_GRAM="torch",
    )
    # The environment is cleared when the script starts, after the simulation has set it.
    assert said[0].startswith("b | ")
    assert said[1].startswith("LIAR_GRAM=a: must be one of torch on cuda:0; unset it")


def test_the_kernels_pass_the_check_and_are_named(tmp_path):
    said = script(
        """
        device = torch.device("cuda", 0)
        found = backends.gram_backends(device)
        print(*found)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for weighted, cross in ((False, False), (True, True)):
                asked = gram_kind(device, dtype, torch.float64, weighted, cross)
                faults = (backends.gram_fault(found[name], asked) for name in ("csrc", "torch"))
                print(*(each or "right" for each in faults))
        x = torch.randn(40, 12, device="cuda")
        sums = [torch.zeros(s, dtype=torch.float64, device="cuda") for s in ([12, 12], 12, 2)]
        ops.gram_update_(*sums, x)
        exact, bound = ((y.mT @ y).tril() for y in (x.double(), x.double().abs()))
        print(bool(((sums[0] - exact).abs() <= 1e-6 * bound).all()), sums[2].tolist())
        print(ops.build_info()["gram"])
        from liar_ext.cli import info
        print(*info.lines(info.facts()), sep="\\n")
        """,
        tmp_path,
    )
    assert said[0].split()[0] == "csrc" and said[0].split()[-1] == "torch"
    assert said[1:9] == ["right right"] * 8
    assert said[9] == "True [40.0, 0.0]"
    assert said[10].startswith("cuda:0 float32 float64 64 × 32: ") and "csrc " in said[10]
    assert any(line.startswith("Gram backend ") for line in said)


def test_a_card_older_than_the_kernels_is_served_by_torch(tmp_path):
    said = script(
        """
        torch.cuda.get_device_capability = lambda device=None: (7, 5)
        print(*backends.gram_backends(torch.device("cuda", 0)))
        x = torch.randn(40, 12)
        sums = [torch.zeros(s, dtype=torch.float64, device="cuda") for s in ([12, 12], 12, 2)]
        ops.gram_update_(*sums, x.cuda())
        gram, kept = x.double().mT @ x.double(), torch.arange(0, 12, 2)
        damps = torch.tensor([0.1], dtype=torch.float64)
        solve, curve = (x[:5], gram, kept, damps), (x[:5], gram, 1, 0.1, 0)
        for op, given in ((ops.reconstruct, solve), (ops.obs_curve, curve)):
            there = [one.cuda() if isinstance(one, torch.Tensor) else one for one in given]
            for mine, theirs in zip(op(*there), op(*given), strict=True):
                torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-8)
        print(bool((sums[0].cpu() - gram.tril()).abs().max() < 1e-4))
        """,
        tmp_path,
    )
    assert said == ["torch", "True"]


def test_planted_faults_of_solves(tmp_path):
    said = script(
        """
        asked = Kind(torch.device("cuda", 0), sizes=(128, 64, 2))
        operator, library = backends.solves, reference.solve_by_library

        def wrong(block, side, shifts):
            for x, code, condition in library(block, side, shifts):
                if len(block) > 100:
                    x[100, 3] *= 1.00001
                yield x, code, condition

        def no_code(block, side, shifts):
            return ((x.nan_to_num(), 0 * code, 1) for x, code, _ in library(block, side, shifts))

        def last_only(block, side, shifts):
            return [*library(block, side, shifts[-1:])] * len(shifts)

        def slow(*system):
            time.sleep(0.05)
            return library(*system)

        for each in (wrong, no_code, last_only, raises, slow):
            choose(operator, asked, a=each, b=library)
        print(*chooser_of({"a": library}, operator).lines())
        """,
        tmp_path,
    )
    assert all(
        line.startswith("b | liar_ext: the a backend of reconstruct is") for line in said[:4]
    )
    assert "128 kept features: W'[2, 3, 100] is" in said[0]
    assert " is right" in said[1] and " is right" in said[2]
    assert "it raises RuntimeError: no kernel image" in said[3]
    assert said[4] == "b"


def test_planted_faults_of_curves(tmp_path):
    said = script(
        """
        asked = Kind(torch.device("cuda", 0), sizes=(64,))
        operator, library = backends.curves, reference.eliminate_panel

        def no_rounds(s, first, count):
            lost = s.lost.clone()
            found = library(s, first, count)
            s.lost.copy_(lost)
            return found

        def wrong(s, first, count):
            left, right, gone = library(s, first, count)
            left[-1, 0] += 1e-4
            return left, right, gone

        def slow(s, first, count):
            time.sleep(0.05)
            return library(s, first, count)

        for each in (no_rounds, wrong, raises, slow):
            choose(operator, asked, a=each, b=library)
        """,
        tmp_path,
    )
    assert all(line.startswith("b | liar_ext: the a backend of obs_curve is") for line in said[:3])
    assert said[3] == "b"


def test_each_size_goes_where_the_rule_says(tmp_path):
    """Small systems and single features are chosen for, and the kernels pass the check."""
    said = script(
        """
        device = torch.device("cuda", 0)
        for each in (backends.solves, backends.curves):
            found = each.backends(device)
            print(*found, *(each.fault(one, Kind(device)) or "right"
                            for one in found.values()))
        def choices():
            return len(backends.solves.chosen), len(backends.curves.chosen)

        damps = torch.tensor([0.1, 1.0], dtype=torch.float64, device="cuda")
        gram, weight = torch.eye(200, device="cuda").double(), torch.randn(5, 200, device="cuda")
        ops.reconstruct(weight, gram, torch.arange(129, device="cuda"), damps)
        ops.obs_curve(weight, gram, 2, 0.1, 90)
        print(*choices())
        ops.reconstruct(weight, gram, torch.arange(128, device="cuda"), damps)
        ops.reconstruct(weight, gram, torch.arange(127, device="cuda"), damps)
        ops.obs_curve(weight, gram, 1, 0.1, 190)
        print(*choices())
        info = ops.build_info()
        print(info["solve"], info["curve"], sep="\\n")
        torch.cuda.get_device_capability = lambda device=None: (7, 5)
        ops.dispatch.runs_kernels.cache_clear()
        ops.reconstruct(weight, gram, torch.arange(5, device="cuda"), damps)
        ops.obs_curve(weight, gram, 1, 0.1, 190)
        print(*choices())
        """,
        tmp_path,
    )
    assert said[:2] == ["csrc torch right right"] * 2
    assert said[2:4] == ["0 0", "1 1"] and said[6] == "1 1"
    assert said[4].startswith("cuda:0 128 × 32 × 2: ") and "csrc " in said[4]
    assert said[5].startswith("cuda:0 256: ") and "csrc " in said[5]
