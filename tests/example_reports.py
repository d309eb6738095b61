"""Reports as they lie in saved folders: an ordinary one, and those of strangers.

    python tests/example_reports.py FOLDER

writes the pages of all of them, for ``browser.py`` to look at.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.folder import REPORT_JSON
from liar_ext.measure.speed import Benchmark, ModelFacts, Quartiles, Rate
from liar_ext.report.page import write_comparison, write_page
from liar_ext.report.reading import bench_file

SCRIPT = "<script>alert(1)</script>"
NASTY = f"\"'><img src=x onerror=alert(2)>{SCRIPT}$\\frac{{1}}$&amp;\u202e\ud800\x00</style></svg>"


def site(name: str, before: int, after: int, error: float, **more: Any) -> dict[str, Any]:
    fields = {"name": name, "units_before": before, "units_after": after}
    fields |= {"params_before": 1728 * before, "params_after": 1728 * after, "damp": 0.01}
    fields |= {"error": error, "holdout_error": 1.2 * error, "condition": 300.0}
    return {**fields, "dropped_rows": 0, "path": "linear", "seconds": 0.25, **more}


def ordinary(layers: int = 30, keep: float = 0.8, **changes: Any) -> dict[str, Any]:
    """A report of a model with attention and MLP in each layer, at some ratio."""
    sites = []
    for layer in range(layers):
        bend = 1 - (1 - keep) * (0.4 + 1.2 * math.sin(math.pi * layer / layers))
        error = 10 ** (-4 + 3 * math.sin(math.pi * layer / layers))
        sites.append(site(f"{layer}.attn", 9, max(1, round(9 * bend)), error))
        sites.append(site(f"{layer}.mlp", 1536, round(1536 * bend), 2 * error, sensitivity=0.1))
    perplexity = {"tokens": 4088, "sequences": 8, "seq_len": 512}
    fields = {
        "model": "an/ordinary-135M",
        "budget": {"keep": keep, "of": "prunable"},
        "settings": {"calibration_tokens": 16384, "eval": "held_out.jsonl", "dtype": "float32"},
        "versions": {"torch": "2.13.0", "liar_ext": "0.1.0"},
        "sites": sites,
        "hidden": [],
        "params": {
            "before": 134515008,
            "after": round(134515008 - (1 - keep) * 106168320),
            "prunable_before": 106168320,
            "prunable_after": round(keep * 106168320),
        },
        "evaluation": {
            "dense": {"perplexity": 27.53, **perplexity},
            "pruned": {"perplexity": 27.53 * math.exp(8 * (1 - keep) ** 2), **perplexity},
            "certified": {"divergence": 0.31, "rows": 2048},
        },
        "seconds": {"load": 3.1, "calibrate": 35.5, "allocate": 175.5, "save": 0.7, "total": 223.7},
        "warnings": ["Few tokens."],
        "loading": "Load it with `liar_ext.load_pruned(folder)`.",
        "recipe": {"version": 1, "keep": keep, "of": "prunable", "criterion": "wifv"},
    }
    return {**fields, **changes}


def hostile() -> dict[str, Any]:
    """A report with markup wherever there is text."""
    fields = ordinary(4, model=NASTY, loading=NASTY, warnings=[NASTY, {NASTY: NASTY}])
    fields["sites"] = [{**each, "name": NASTY} for each in fields["sites"]]
    fields["hidden"] = [site(NASTY, 10, 5, 0.1)]
    for name in ("budget", "settings", "versions", "recipe"):
        fields[name] = {NASTY: NASTY, "keep": NASTY, "of": NASTY, "criterion": NASTY}
    fields["seconds"] = {NASTY: 1.0, "b" * 300: 2.0, **{f"{NASTY}{i}": 0.5 for i in range(30)}}
    return fields


def wrong() -> dict[str, Any]:
    """A report whose fields are of other kinds, and whose numbers are none."""
    row = {"name": 5, "units_before": -1, "units_after": 10**400, "error": "nan", "damp": []}
    return {
        "model": ["x"] * 10**4,
        "sites": [row, None, 3, [], {"name": "1.mlp", "units_before": 2**60, "units_after": True}],
        "hidden": {"a": 1},
        "params": {"before": 0, "after": 1e308, "prunable_before": -4, "prunable_after": "7"},
        "evaluation": {"dense": {"perplexity": "inf"}, "pruned": [1], "certified": 3},
        "seconds": {"a": -1, "b": "x", "total": None, "c": 0},
        "warnings": {"no": "list"},
        "loading": {"a": {"b": 1}},
        "settings": [1, 2],
        "versions": None,
    }


def save(folder: Path, fields: Any) -> Path:
    """Write a report as a saved folder holds it."""
    path = folder / REPORT_JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields), encoding="utf-8")
    return folder


def bench_of(folder: Path, speed: float = 1.2, **changes: Any) -> Benchmark:
    """A benchmark of the state that a folder is in."""
    digest = hashlib.sha256((folder / REPORT_JSON).read_bytes()).hexdigest()
    params = json.loads((folder / REPORT_JSON).read_text())["params"]
    rates = []
    for batch in (1, 32):
        for what, unit in (("prefill", "tokens/s"), ("decode", "tokens/s")):
            base = 100.0 * batch**0.5 if what == "prefill" else 20.0 * batch**0.5
            found = [Quartiles(x, 0.95 * x, 1.05 * x) for x in (base * speed, base, speed)]
            rates.append(Rate(batch, what, unit, *found))
    fields = {
        "pruned": ModelFacts(str(folder), params["after"], 4 * params["after"], {"load": 9 << 20}),
        "dense": ModelFacts("dense", params["before"], 4 * params["before"], {"load": 10 << 20}),
        "report_digest": digest,
        "settings": {"rounds": 5, "threads": 1, "dtype": "float32", "batches": [1, 32]},
        "machine": {"cpu": "a CPU", "torch": "2.13.0"},
        "rates": rates,
    }
    return Benchmark(**{**fields, **changes})


def store_bench(folder: Path, **changes: Any) -> Path:
    path = bench_file(folder)
    path.write_text(bench_of(folder, **changes).to_json())
    return path


def write_pages(folder: Path) -> list[Path]:
    """Write the pages of every example, and comparisons of them."""
    reports = {"ordinary": ordinary(), "nothing": {}, "hostile": hostile(), "wrong": wrong()}
    reports |= {"deep": ordinary(126, 0.5), "short": ordinary(1, 0.5)}
    pages = []
    for name, fields in reports.items():
        save(folder / name, fields)
        if name in ("ordinary", "deep"):
            store_bench(folder / name, speed=1.17)
        pages += write_page(folder / name, folder / f"{name}.html", folder / "png" / name)
    runs = []
    for keep in (0.5, 0.6, 0.7, 0.8, 0.81, 0.9):
        runs.append(save(folder / f"keep-{keep}", ordinary(keep=keep)))
        store_bench(runs[-1], speed=1 + 0.9 * (1 - keep))
    pages += write_comparison(runs, folder / "compare.html", folder / "png" / "compare")
    odd = [runs[0], folder / "hostile", folder / "nothing", folder / "wrong", folder / "deep"]
    pages += write_comparison(odd, folder / "compare-odd.html", folder / "png" / "odd")
    return pages


if __name__ == "__main__":
    for path in write_pages(Path(sys.argv[1])):
        print(path)
