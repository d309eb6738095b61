"""Perplexity of a model with a smaller hidden size, beside units removed at equal parameters.

For every fraction of the hidden size, one row each for: features sliced, no reconstruction; the
norms scaled to what they put out before; the readers solved as well, which is what `--keep-hidden`
does; and attention and MLP units removed by the default method until as few parameters are left.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

from common import calibrated_on, text_parser, windows_of, write_json
from torch import nn

from liar_ext import Budget, Plan, apply_plan, narrow, perplexity, prune
from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.folder import count_params
from liar_ext.models.residual_stream import hidden_of


def main() -> None:
    """Measure, and write after every row."""
    options = parse()
    model, tokenizer = load_model(options.model)
    how = {"seed": options.seed, "lone": "halves"}  # as the rows of docs/quality.md were drawn
    calibration = calibrated_on(options, tokenizer, **how).batches()
    judged = options.eval, tokenizer, options.seq_len, options.eval_samples
    evaluation = windows_of(*judged).batches()
    dense, rows = count_params(model), []

    def note(method: str, pruned: nn.Module, start: float) -> None:
        seconds = time.process_time() - start
        result = perplexity(pruned, evaluation)
        rows.append(
            {
                "method": method,
                "hidden": hidden_of(pruned).size,
                "params": count_params(pruned),
                "kept": count_params(pruned) / dense,
                "perplexity": result["perplexity"],
                "tokens": result["tokens"],
                "cpu_seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
        settings = {k: str(v) for k, v in vars(options).items()}
        write_json(options.out, {"settings": settings, "rows": rows})

    note("dense", model, time.process_time())
    for fraction in options.keep_hidden:
        start = time.process_time()
        done = narrow(model, calibration, fraction, tile=1)
        plan = Plan(model.config.model_type, "auto", {}, hidden=done.kept)
        norms = {path: done.weights[path] for path in hidden_of(model).norms}
        for method, weights in (("sliced", {}), ("norms", norms), ("solved", done.weights)):
            small = copy.deepcopy(model)
            apply_plan(small, plan, weights)
            note(f"hidden, {method}", small, start)
        kept = count_params(small) / dense
        if not options.hidden_only:
            start, other = time.process_time(), copy.deepcopy(model)
            prune(other, calibration, Budget(kept, of="params", tile=1))
            note("units", other, start)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = text_parser(__doc__, samples=32, seq_len=512)
    add = parser.add_argument
    add("--eval", required=True)
    add("--keep-hidden", nargs="+", type=float, default=[0.91, 0.82])
    add("--hidden-only", action="store_true", help="leave out the rows of units alone")
    add("--eval-samples", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/hidden/hidden.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
