"""The presets beside one another: time in forward passes over the calibration text, and perplexity.

A forward pass is that of the whole model, head included, over the same batches, timed in the same
run. Times are of the processor, so that other jobs of the machine don't count; take one thread
(`OMP_NUM_THREADS=1`). Also says what `--dry-run` estimates. All with tile 1, as docs/performance.md
has it. Writes presets.json and presets.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from liar_ext import Recipe, perplexity, prune
from liar_ext.calibration.batches import FACTS
from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.texts import calibration_sequences, evaluation_sequences
from liar_ext.checkpoint import load_model
from liar_ext.job.dry_run import describe


def main() -> None:
    """Measure, and write after every preset."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    sequences = calibration_sequences(
        [read_documents(options.calibration)],
        tokenizer,
        samples=options.samples,
        seq_len=options.seq_len,
    )
    batches = sequences.batches()
    held_out = evaluation_sequences(
        read_documents(options.eval),
        tokenizer,
        seq_len=options.seq_len,
        samples=options.eval_samples,
    ).batches()
    forward = seconds(lambda: run(model, batches))
    dense = perplexity(model, held_out)["perplexity"]
    rows = [{"preset": "forward pass", "seconds": forward, "forwards": 1.0, "perplexity": dense}]
    for name in ("fast", "balanced", "best"):
        recipe = Recipe.preset(name, keep=options.keep, seq_len=options.seq_len, tile=1)
        said = next(x for x in describe(model, batches, recipe) if x.startswith("time"))
        work = copy.deepcopy(model)
        spent = seconds(lambda work=work, recipe=recipe: prune(work, batches, recipe))
        result = perplexity(work, held_out)["perplexity"]
        rows.append(
            {
                "preset": name,
                "seconds": spent,
                "forwards": spent / forward,
                "perplexity": result,
                "dry_run": said,
            }
        )
        (options.out / "presets.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "presets.md").write_text(markdown(rows, sequences.tokens))
        print(json.dumps(rows[-1]), flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, hub id or GGUF file")
    add("--calibration", required=True)
    add("--eval", required=True)
    add("--samples", type=int, default=32)
    add("--seq-len", type=int, default=256)
    add("--eval-samples", type=int, default=16)
    add("--keep", type=float, default=0.8)
    add("--out", type=Path, default=Path("out/presets"))
    return parser.parse_args()


@torch.no_grad()
def run(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """Run the model over the batches."""
    for batch in batches:
        model(**{key: value for key, value in batch.items() if key not in FACTS}, use_cache=False)


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of processor time that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def markdown(rows: list[dict], tokens: int) -> str:
    """Return a table."""
    lines = [
        f"{tokens:,} calibration tokens, {torch.get_num_threads()} thread(s).",
        "",
        "| preset | CPU s | forward passes over the calibration text | perplexity |",
        "|---|---|---|---|",
    ]
    return "\n".join(lines) + "".join(
        f"\n| {row['preset']} | {row['seconds']:.0f} | {row['forwards']:.1f} "
        f"| {row['perplexity']:.2f} |"
        for row in rows
    )


if __name__ == "__main__":
    main()
