"""The default job, and that with tile 1, on a tiny model of each family: what they gave before.

Plan and weights are compared.

Bits depend on the processor and on torch, so that digests are compared where both are those of the
record, and rounded figures elsewhere. ``python tests/test_unchanged.py default`` (or ``tile_1``)
writes a record anew; do that only in a commit that says why results change.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path

import pytest
import torch
from covers import cover
from tiny import TINY, tiny, tiny_inputs

import liar_ext
from liar_ext import ops

ASSETS = Path(__file__).parent / "assets"
# What is asked for besides the budget, and where the result is recorded.
JOBS = {
    "default": ({}, ASSETS / "default_job.json"),
    "tile_1": ({"tile": 1}, ASSETS / "job_at_tile_1.json"),
}


def machine() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernel": ops.build_info()["cpu_kernel"],
        "processor": platform.machine(),
        "model": processor_model(),
    }


def processor_model() -> str:
    """Return family and model of the processor: libraries choose kernels by them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    names = ("vendor_id", "cpu family", "model", "stepping")
    return " ".join(facts.get(name, "").strip() for name in names)


def run(family: str, choices: dict) -> dict[str, object]:
    """Prune a tiny model; return its plan, and figures and digest of its weights."""
    model = tiny(family)
    batches = [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(4)]
    report = liar_ext.prune(model, batches, keep=0.7, **choices)
    digest, figures = hashlib.sha256(), {}
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        figures[name] = [list(tensor.shape), float(tensor.double().norm())]
    plan = {name: list(site.kept) for name, site in report.plan.sites.items()}
    return {"plan": plan, "figures": figures, "sha256": digest.hexdigest()}


@cover(1, job=JOBS, family=TINY)
def test_a_job_gives_what_it_gave(family, job):
    choices, path = JOBS[job]
    record = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    now, then = run(family, choices), record["families"][family]
    assert now["plan"] == then["plan"]
    assert now["figures"].keys() == then["figures"].keys()
    for name, (shape, norm) in then["figures"].items():
        assert now["figures"][name][0] == shape, name
        assert now["figures"][name][1] == pytest.approx(norm, rel=1e-4), name
    if machine() == record["machine"]:
        assert now["sha256"] == then["sha256"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    choices, path = JOBS[sys.argv[1]]
    results = {family: run(family, choices) for family in TINY}
    text = json.dumps({"machine": machine(), "families": results})
    path.write_text(text + "\n", encoding="utf-8")
