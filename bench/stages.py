"""CPU seconds of each stage of a job in forward passes, beside those of the estimate.

`liar_ext/job/estimate.py` has its factors from here.

OMP_NUM_THREADS=1 python bench/stages.py MODEL --calibration TEXT --layers 8 --samples 32
"""

from __future__ import annotations

import argparse
import copy
import io
import re
import time
from collections import Counter
from unittest import mock

from common import calibrated_on, cpu_seconds, forward, keep_layers, text_parser

from liar_ext import Budget, Recipe, prune
from liar_ext.checkpoint import load_model
from liar_ext.job import pruning
from liar_ext.job.estimate import RATE
from liar_ext.models.sites import sites
from liar_ext.selection.costs import total_cost
from liar_ext.system.progress import Bar, Timeline

JOBS = {
    "one pass": {"schedule": "one-pass"},
    "layer by layer": {"schedule": "layerwise", "allocation": "uniform"},
    "hidden size": {"schedule": "one-pass", "allocation": "uniform", "keep_hidden": 0.8},
}


def main() -> None:
    """Print a row for each stage of each job."""
    options = parse()
    model, tokenizer = load_model(options.model)
    keep_layers(model, options.layers)
    batches = calibrated_on(options, tokenizer).batches()
    forward(model, batches[:1])
    once = cpu_seconds(lambda: forward(model, batches))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    work = total_cost(model, sites(model), Budget(1.0, "flops", seq_len=1)) * tokens
    print(f"{tokens} tokens: {once:.1f} s, {work / once / 1e9:.1f} operations a nanosecond")
    for name in options.jobs:
        recipe = Recipe(keep=options.keep, **JOBS[name])
        spent, counted = measure(copy.deepcopy(model), batches, recipe)
        print(name)
        for stage in spent:
            of = counted.get(stage, float("nan"))
            said = f"{spent[stage] / once:.2f} taken, {of / work:.2f} counted"
            print(f"  {stage}: {said}", flush=True)


def measure(model, batches, recipe: Recipe) -> tuple[Counter, dict[str, float]]:
    """Return the CPU seconds of a job by the names of its bars, and the work that it expects."""
    spent, lines, begun, init, close = Counter(), [], {}, Bar.__init__, Bar.close
    terminal = io.StringIO()
    terminal.isatty = lambda: True

    def start(bar, *given, **settings) -> None:
        init(bar, *given, **{**settings, "file": terminal})
        begun[bar] = time.process_time()

    def end(bar) -> None:
        if bar in begun:
            spent[re.split("[,:]", bar.desc)[0]] += time.process_time() - begun.pop(bar)
        close(bar)

    def shown(*given) -> Timeline:
        lines.append(Timeline(*given))
        return lines[0]

    with (
        mock.patch.object(Bar, "__init__", start),
        mock.patch.object(Bar, "close", end),
        mock.patch.object(Bar, "__hash__", object.__hash__),
        mock.patch.object(pruning, "Timeline", shown),
    ):
        prune(model, batches, recipe, progress=True)
    return spent, {name: RATE * each.work for name, each in lines[0].stages.items()}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = text_parser(__doc__, samples=32, seq_len=256)
    parser.add_argument("--layers", type=int, help="blocks that run; all, if not given")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
