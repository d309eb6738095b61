"""Pruned folders of three families in every consumer, each cell in a process of its own.

``make matrix`` runs it: {Llama-like, Qwen2, BERT-like} × {equal, unequal, hidden, tokens, blocks} ×
consumers. Rows are kept in ``OUT/matrix.json`` as they come, and folders beside it; a second run
makes what is missing, and where the code has changed OUT should be removed first. A cell that
cannot be is run nevertheless: it must be refused, with a reason that ``refusals.py`` expects. The
exit code is 1 if a cell fails, or one that is expected to be refused is not.

    python bench/matrix --llama FOLDER --bert FOLDER --texts FOLDER --write
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page
from make_folders import (
    AUTO,
    FAMILIES,
    LAYERS,
    SENTENCES,
    dense_models,
    prune,
    write_task,
    write_tokens,
)
from refusals import expected

CELLS = Path(__file__).with_name("cells.py")
ROOT = CELLS.parents[2]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask for the model's class
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONSAFEPATH": "1",
}


def main() -> None:
    """Make the folders, run the cells that are missing, print and write the tables."""
    options = parse()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "matrix.json"
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    rows = {n: row if row["state"] == "not run" else judge(n, row) for n, row in rows.items()}
    jobs = make_jobs(options, out)
    wanted: dict[str, dict[str, dict]] = {}
    for name, job in jobs.items():
        done = name in rows and rows[name]["state"] != "not run"
        done = done and not (options.again and re.search(options.again, name))
        if not done and re.search(options.only, name):
            wanted.setdefault(job["consumer"], {})[name] = job
    for consumer, some in wanted.items():
        for name, row in run(consumer, some, options):
            rows[name] = row
            print(
                f"{name}: {row['state']} {row['number']} {row['reason']} [{row['seconds']} s]",
                flush=True,
            )
            kept.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(page.compact(rows))
    if options.write:
        page.write(ROOT / "README.md", page.compact(rows))
        page.write(ROOT / "docs" / "matrix.md", page.full(rows))
    states = [rows[name]["state"] if name in rows else "not run" for name in jobs]
    counts = {state: states.count(state) for state in ("good", "cannot", "bad", "not run")}
    print(counts)
    raise SystemExit(counts["bad"] + counts["not run"] > 0)


def make_jobs(options: argparse.Namespace, out: Path) -> dict[str, dict[str, Any]]:
    """Prune what isn't there yet; return the jobs by the names of their cells."""
    held_out = options.texts / "held_out_news.jsonl"
    dense = dense_models(out, options.llama.resolve(), options.bert.resolve())
    write_task(held_out, out / "tasks")
    jobs = {}
    for family in FAMILIES:
        for layers in LAYERS:
            folder = out / f"{family}-{layers}"
            prune(dense[family], folder, family, layers, options.texts / "web.jsonl")
            tokenizer, ids = dense[family], out / f"{family}.npy"
            if layers == "tokens":
                tokenizer, ids = folder, folder.with_suffix(".npy")
            write_tokens(tokenizer, held_out, ids)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            for consumer in page.CONSUMERS:
                jobs[page.key(consumer, family, layers)] = {
                    "consumer": consumer,
                    "folder": str(folder),
                    "dense": str(dense[family]),
                    "auto": AUTO.get(family, "AutoModelForCausalLM"),
                    "causal": family not in AUTO,
                    "code": config["liar"]["layers"] != "equal",
                    "ids": str(ids),
                    "texts": SENTENCES,
                    "tasks": str(out / "tasks"),
                    "room": str(out / "room"),
                    "reference": str(out / f"{family}-{layers}.reference.json"),
                }
    return jobs


def run(consumer: str, jobs: dict[str, dict], options: argparse.Namespace) -> Iterator[tuple]:
    """Yield names and rows of a consumer's cells: good, bad, or refused as they must be."""
    python = sys.executable
    if consumer == "vLLM":
        python = options.vllm
        told = "vLLM, reference"
        for _ in process({n: job | {"consumer": told} for n, job in jobs.items()}, sys.executable):
            pass
    elif consumer.startswith("llm-compressor"):
        python = options.compressor
    if not shutil.which(python):
        for name in jobs:
            row = {"number": "", "seconds": 0, "reason": f"there is no {python}"}
            yield name, {"state": "not run", **row}
        return
    done = set()
    for name, found in process(jobs, python):
        done.add(name)
        yield name, judge(name, found)
    for name in jobs.keys() - done:
        yield name, judge(name, {"error": "the process of its consumer died", "seconds": 0})


def process(jobs: dict[str, dict], python: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the jobs of a consumer by a Python; yield their rows as they come."""
    job = next(iter(jobs.values()))
    room = Path(job["room"])
    room.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python == sys.executable:  # this tree, which need not be the one that is installed
        environment["PYTHONPATH"] = str(ROOT)
    environment["HF_MODULES_CACHE"] = str(room.parent / "modules")
    environment["HF_DATASETS_CACHE"] = str(room.parent / "datasets")
    log = room.parent / f"{job['consumer']}.log"
    with log.open("w", encoding="utf-8") as errors, subprocess.Popen(
        [python, str(CELLS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        text=True, errors="replace", env=environment | SETTINGS, cwd=room.parent,
    ) as running:  # fmt: skip
        json.dump(jobs, running.stdin)
        running.stdin.close()
        for line in running.stdout:
            if line.startswith("{"):
                yield from json.loads(line).items()


def judge(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Tell whether a row is as it must be."""
    wanted = expected(name)
    row = {"number": "", "date": str(datetime.date.today()), **found, "reason": ""}
    if "error" in found:
        error = " ".join(found["error"].split())[:2000]
        refused = wanted is not None and re.search(wanted[0], error) is not None
        row |= {"state": "cannot" if refused else "bad"}
        row["reason"] = wanted[1] if refused else error[:300]
    elif wanted is not None:
        row |= {"state": "bad", "reason": f"was expected to be refused: {wanted[1]}"}
    else:
        row["state"] = "good" if found["good"] else "bad"
        row["reason"] = "" if found["good"] else "other outputs than there must be"
    return row


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--llama", type=Path, required=True, help="folder of the Llama-like model")
    add("--bert", type=Path, required=True, help="folder of the sentence encoder")
    add("--texts", type=Path, required=True, help="has web.jsonl and held_out_news.jsonl")
    add("--out", type=Path, default=Path("out/matrix"))
    add("--vllm", default="build/vllm/bin/python", help="Python that has vLLM")
    add("--compressor", default="build/llmcompressor/bin/python", help="that has llm-compressor")
    add("--only", default="", help="regular expression: cells to run")
    add("--again", help="regular expression: cells to run once more")
    add("--write", action="store_true", help="put the tables into README.md and docs/matrix.md")
    options = parser.parse_args()
    for name in ("vllm", "compressor"):  # processes run elsewhere; a link to Python stays one
        setattr(options, name, os.path.abspath(getattr(options, name)))
    return options


if __name__ == "__main__":
    main()
