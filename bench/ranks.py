"""One job by 1, 2 and 3 ranks: the same plan, and weights that agree within rounding.

    python bench/ranks.py --out out/ranks

runs `torchrun --nproc-per-node N -m liar_ext prune` on a Llama with random weights, or on another
model and text, layer by layer and in one pass, in float64 and in float32, and prints a table; and
once more by blocks, with `--max-memory`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from common import write_random_text
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = 256  # a token each
WAYS = ("in memory", "by blocks")
LIMIT = "8GiB"  # of --max-memory; a rank has libraries and one block


def main() -> None:
    """Run every job, and print a row for each."""
    options = parse()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    model, text = options.model, options.calibration
    if model is None:
        model, text = options.out / "dense", options.out / "text.txt"
        write_model(model)
        write_random_text(text, 60, model)
    job = ["--calibration", str(text), "--quiet"]
    job += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    for way in options.ways:
        print(f"\n{way}\n")
        print("| dtype | schedule | ranks | plan | weights |")
        print("|---" * 5 + "|")
        limit = ["--max-memory", LIMIT] if way == "by blocks" else []
        for dtype, schedule in product(options.dtypes, options.schedules):
            more = ["--dtype", dtype, "--schedule", schedule, *limit]
            first = None  # which others are compared with
            for count in options.ranks:
                out = options.out / f"{way.replace(' ', '-')}-{dtype}-{schedule}-{count}"
                prune(count, [str(model), *job, *more, "--out", str(out)])
                plan, weights = read(out)
                first = first or (plan, weights)
                same = "same" if plan == first[0] else "OTHER"
                far = f"{difference(weights, first[1]):.0e}" if same == "same" else "–"
                print(f"| {dtype} | {schedule} | {count} | {same} | {far} |", flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a model folder; a small Llama with random weights if not given")
    add("--calibration", type=Path, help="its text")
    add("--ranks", type=int, nargs="+", default=[1, 2, 3])
    add("--dtypes", nargs="+", default=["float64", "float32"])
    add("--schedules", nargs="+", default=["layerwise", "one-pass"])
    add("--ways", nargs="+", default=WAYS, choices=WAYS, help="the whole model, or a block")
    add("--samples", type=int, default=24)
    add("--seq-len", type=int, default=64)
    add("--out", type=Path, default=Path("out/ranks"), help="a folder of its own, emptied first")
    options = parser.parse_args()
    if (options.model is None) != (options.calibration is None):
        parser.error("--model and --calibration go together")
    return options


def write_model(folder: Path) -> None:
    """Write a Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prune(count: int, words: list[str]) -> None:
    """Prune a model by so many ranks, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "liar_ext", "prune"]
    subprocess.run(command + words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the plan and the weights of a folder."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return json.loads((folder / "liar/plan.json").read_text(encoding="utf-8")), weights


def difference(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two values, by the largest value of their tensor."""
    assert weights.keys() == others.keys()
    return max(
        float((weights[name] - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for name, other in others.items()
    )


if __name__ == "__main__":
    main()
