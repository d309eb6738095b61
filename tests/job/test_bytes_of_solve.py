"""What a solve is promised to take in memory beside what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from liar_ext.job.estimate import PEAKS, bytes_of_solve, steps_of
from liar_ext.models.recipe import Recipe

ROOT = Path(__file__).parents[2]
# Wide in and wide out: each of the two factors decides in one of them.
SHAPES = [(1536, 256), (512, 3072)]


@pytest.fixture(scope="module")
def measured():
    """The peaks of all kinds at all shapes, in a process of their own."""
    code = (
        "from bench.solve_memory import measure, PEAKS\n"
        f"print([[measure(kind, *shape) for shape in {SHAPES}] for kind in PEAKS])"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # What is freed goes back to the system, so that the next measurement can see it taken.
    single = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **single},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(run.stdout)
    return dict(zip(PEAKS, rows, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", PEAKS)
def test_a_solve_takes_what_it_is_allowed_and_not_much_less(kind, measured):
    for rose, shape in zip(measured[kind], SHAPES, strict=True):
        allowed = bytes_of_solve(*shape, [kind])
        assert rose <= allowed, (kind, shape, rose, allowed)
        assert allowed <= 2.5 * rose + (48 << 20), (kind, shape, rose, allowed)


def test_the_greediest_step_counts():
    one_pass = {"schedule": "one-pass", "allocation": "uniform"}
    assert steps_of(Recipe(keep=0.8, **one_pass), False) == ["linear"]
    assert steps_of(Recipe(keep=0.8, **one_pass), True) == ["affine"]
    walk = Recipe(keep=0.8, schedule="layerwise", allocation="curve", criterion="obs")
    assert steps_of(walk, True) == ["towards, affine", "affine", "curve", "obs"]
    each = [bytes_of_solve(4096, 1024, [step]) for step in PEAKS]
    assert bytes_of_solve(4096, 1024, list(PEAKS)) == max(each)
