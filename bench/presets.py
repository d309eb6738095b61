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
from pathlib import Path

import torch
from common import (
    calibrated_on,
    cpu_seconds,
    forward,
    table,
    text_parser,
    windows_of,
    write_json,
)

from liar_ext import Recipe, perplexity, prune
from liar_ext.checkpoint import load_model
from liar_ext.job.planning import describe


def main() -> None:
    """Measure, and write after every preset."""
    options = parse()
    model, tokenizer = load_model(options.model)
    sequences = calibrated_on(options, tokenizer)
    batches = sequences.batches()
    judged = options.eval, tokenizer, options.seq_len, options.eval_samples
    held_out = windows_of(*judged).batches()
    once = cpu_seconds(lambda: forward(model, batches))
    dense = perplexity(model, held_out)["perplexity"]
    rows = [{"preset": "forward pass", "seconds": once, "forwards": 1.0, "perplexity": dense}]
    for name in ("fast", "balanced", "best"):
        recipe = Recipe.preset(name, keep=options.keep, seq_len=options.seq_len, tile=1)
        said = next(x for x in describe(model, batches, recipe) if x.startswith("time"))
        work = copy.deepcopy(model)
        spent = cpu_seconds(lambda work=work, recipe=recipe: prune(work, batches, recipe))
        result = perplexity(work, held_out)["perplexity"]
        row = {"preset": name, "seconds": spent, "forwards": spent / once}
        rows.append(row | {"perplexity": result, "dry_run": said})
        write_json(options.out / "presets.json", rows)
        (options.out / "presets.md").write_text(markdown(rows, sequences.tokens))
        print(json.dumps(rows[-1]), flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = text_parser(__doc__, samples=32, seq_len=256)
    add = parser.add_argument
    add("--eval", required=True)
    add("--eval-samples", type=int, default=16)
    add("--keep", type=float, default=0.8)
    add("--out", type=Path, default=Path("out/presets"))
    return parser.parse_args()


def markdown(rows: list[dict], tokens: int) -> str:
    """Return a table."""
    columns = ["preset", "CPU s", "forward passes over the calibration text", "perplexity"]
    forms = {"preset": "", "seconds": ".0f", "forwards": ".1f", "perplexity": ".2f"}
    cells = [[format(row[name], form) for name, form in forms.items()] for row in rows]
    threads = torch.get_num_threads()
    return f"{tokens:,} calibration tokens, {threads} thread(s).\n\n{table(columns, cells)}"


if __name__ == "__main__":
    main()
