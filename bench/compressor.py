"""Pruning beside quantisation in llm-compressor, alone and in one recipe: perplexity and megabytes.

Runs where llm-compressor is installed (`make show-llmcompressor`). Each row is one call of
``oneshot`` on the same calibration sequences; its folder is then loaded and run by another process
that has transformers and compressed-tensors, and not liar_ext. Writes Markdown and JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import calibrated_on, table, text_parser, windows_of, write_json
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from liar_ext.integrations.llmcompressor import LIARGPTQModifier, LIARPruningModifier
from liar_ext.measure.evaluation import perplexity

ROWS = {
    "dense": (False, None),
    "pruned": (True, None),
    "W4A16, round to nearest": (False, "rtn"),
    "W4A16, GPTQ": (False, "gptq"),
    "pruned + W4A16, round to nearest": (True, "rtn"),
    "pruned + W4A16, GPTQ that calibrates again": (True, "gptq"),
    "pruned + W4A16, GPTQ on the Grams of pruning": (True, "shared"),
}
QUANTISERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "shared": LIARGPTQModifier}
GENERATE = """
import importlib.util, sys
assert importlib.util.find_spec("liar_ext") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, layers = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=layers == "unequal")
tokenizer = AutoTokenizer.from_pretrained(folder)
made = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=16, do_sample=False)
print("generated:", repr(tokenizer.decode(made[0])))
"""


def main() -> None:
    """Measure all rows, write after every one, and keep those of the same options."""
    options = parse()
    torch.manual_seed(0)
    out = Path(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # Quantisers are calibrated on these, too.
    sequences = calibrated_on(options, tokenizer, random_tokens=0.0)
    calibration = DataLoader(alternating(sequences), batch_size=options.batch_size)
    windows = {
        Path(path).stem: windows_of(path, tokenizer, options.seq_len, options.eval_samples)
        for path in options.eval
    }
    texts = {name: each.batches(2) for name, each in windows.items()}
    done, choices = out / "compressor.json", {**vars(options), "out": None}
    before = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    rows = before["rows"] if before.get("options") == choices else []
    for name, (pruned, quantiser) in ROWS.items():
        if any(row["name"] == name for row in rows):
            continue
        rows.append(measure(name, pruned, quantiser, options, tokenizer, calibration, texts))
        write_json(done, {"options": choices, "rows": rows})
        (out / "compressor.md").write_text(markdown(rows, texts), encoding="utf-8")
        gc.collect()
    print(markdown(rows, texts))


def alternating(sequences) -> list[dict[str, torch.Tensor]]:
    """Return the sequences, those of the two folds in turn: a loader's folds alternate."""
    folds = [(sequences.fold == fold).nonzero().flatten().tolist() for fold in (0, 1)]
    order = [row for pair in zip(*folds, strict=False) for row in pair]
    return [
        {"input_ids": sequences.input_ids[i], "attention_mask": sequences.attention_mask[i]}
        for i in order
    ]


def measure(name, pruned, quantiser, options, tokenizer, calibration, texts) -> dict:
    """Return one row: make the model, save it, load it, judge it."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    folder = Path(options.out) / "model"
    shutil.rmtree(folder, ignore_errors=True)
    start, recipe, facts = time.process_time(), [], {}
    if pruned:
        recipe.append(
            LIARPruningModifier(
                preset=options.preset,
                keep=options.keep,
                tile=options.group,
                uniform_layers=not options.unequal,
            )
        )
    if quantiser:
        recipe.append(QUANTISERS[quantiser](**scheme(options.group)))
    if recipe:
        oneshot(
            model=model, tokenizer=tokenizer, recipe=recipe, dataset=calibration,
            output_dir=str(folder),
        )  # fmt: skip
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    facts["cpu_seconds"] = time.process_time() - start
    if pruned:
        facts["params"] = recipe[0].report.params
    del model, recipe
    gc.collect()
    unequal = pruned and options.unequal
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=unequal)
    return {
        "name": name,
        "megabytes": sum(each.stat().st_size for each in folder.glob("*.safetensors")) / 1e6,
        **{f"perplexity {text}": perplexity(again, some) for text, some in texts.items()},
        "generated": generate(folder, options.prompt, "unequal" if unequal else "equal"),
        **facts,
    }


def scheme(group: int) -> dict:
    """Return W4A16 with groups of another size than the preset's 128."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group}
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def generate(folder: Path, prompt: str, layers: str) -> str:
    """Return what another process, without liar_ext, makes of the folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder.resolve()), prompt, layers],
        cwd="/", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.rpartition("generated: ")[2].strip()


def markdown(rows: list[dict], texts: dict) -> str:
    """Return the table."""
    cells = []
    for row in rows:
        judged = [f"{row[f'perplexity {text}']['perplexity']:.2f}" for text in texts]
        cells.append([row["name"], f"{row['megabytes']:.1f}", f"{row['cpu_seconds']:.0f}", *judged])
    return table(["model", "MB", "CPU seconds", *texts], cells) + "\n"


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = text_parser(__doc__, samples=32, seq_len=512)
    add = parser.add_argument
    add("--eval", nargs="+", required=True, help="held-out texts")
    add("--out", default="out/compressor")
    add("--keep", type=float, default=0.8)
    add("--preset", default="balanced", help="of the recipe of pruning")
    add("--unequal", action="store_true", help="let layers differ in size")
    add("--group", type=int, default=64, help="inputs that share a scale; sizes are multiples")
    add("--eval-samples", type=int, default=8)
    add("--batch-size", type=int, default=4)
    add("--dtype", default="bfloat16")
    add("--prompt", default="The capital of France is")
    return parser.parse_args()


if __name__ == "__main__":
    main()
