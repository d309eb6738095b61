"""The default job on a tiny model of each family gives what it gave before: plan and weights.

Bits depend on the processor and on torch, so that digests are compared where both are those of the
record, and rounded figures elsewhere. ``python tests/test_unchanged.py`` writes the record anew;
do that only in a commit that says why results change.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny, tiny_inputs

import liar_ext
from liar_ext import ops

RECORD = Path(__file__).parent / "assets" / "default_job.json"


def machine() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernel": ops.build_info()["cpu_kernel"],
        "processor": platform.machine(),
    }


def run(family: str) -> dict[str, object]:
    """Prune a tiny model by the default; return its plan, and figures and digest of its weights."""
    model = tiny(family)
    batches = [tiny_inputs(model, batch=4, tokens=12, seed=seed) for seed in range(4)]
    report = liar_ext.prune(model, batches, keep=0.7)
    digest, figures = hashlib.sha256(), {}
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        figures[name] = [list(tensor.shape), float(tensor.double().norm())]
    plan = {name: list(site.kept) for name, site in report.plan.sites.items()}
    return {"plan": plan, "figures": figures, "sha256": digest.hexdigest()}


@pytest.mark.parametrize("family", TINY)
def test_default_job_gives_what_it_gave(family):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    now, then = run(family), record["families"][family]
    assert now["plan"] == then["plan"]
    assert now["figures"].keys() == then["figures"].keys()
    for name, (shape, norm) in then["figures"].items():
        assert now["figures"][name][0] == shape, name
        assert now["figures"][name][1] == pytest.approx(norm, rel=1e-4), name
    if machine() == record["machine"]:
        assert now["sha256"] == then["sha256"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {family: run(family) for family in TINY}
    text = json.dumps({"machine": machine(), "families": results})
    RECORD.write_text(text + "\n", encoding="utf-8")
