"""``liar info``: what this installation has."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from liar_ext import ops
from liar_ext.models.registry import FAMILIES
from liar_ext.report.report import versions
from liar_ext.selection.criteria import list_criteria


def run(options: argparse.Namespace) -> None:
    """Print versions, kernels in use, criteria, families and optional packages."""
    criteria = [known.name for known in list_criteria()]
    optional = {
        "gguf": "GGUF files",
        "llama_cpp_py_sync": "GGUF files quantised",
        "datasets": "datasets by name",
        "accelerate": "device_map",
    }
    if options.json:
        facts = {"versions": versions(), "criteria": criteria, "families": list(FAMILIES)}
        facts |= {"optional": {package: find_spec(package) is not None for package in optional}}
        print(json.dumps({**facts, "extension": str(Path(ops.__file__).parents[1])}, indent=1))
        return
    for key, value in versions().items():
        print(f"{key:32} {value}")
    print(f"{'criteria':32} {', '.join(criteria)}")
    for package, what in optional.items():
        state = "available" if find_spec(package) else f"pip install {package}"
        print(f"{what:32} {state}")
    print(f"{'families':32} {', '.join(FAMILIES)}")
    print(f"{'extension':32} {Path(ops.__file__).parents[1]}")
