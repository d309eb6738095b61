"""What a moment bank spares: seconds of a sweep over five budgets beside those of one forward pass.

The forward pass is the whole model's, output head included, over the tokens of the calibration.
The bank is written to a file with the sensitivities, and read back; from then on the model is not
run any more, which is checked. One budget is solved, and compared with the run from scratch bit for
bit. With one thread seconds are of the processor, so that other jobs of the machine don't count.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from common import calibrated_on, forward, text_parser
from torch import nn

from liar_ext import MomentBank, Recipe, calibrate, prune, sweep
from liar_ext.checkpoint import load_model
from liar_ext.job.planning import KEEP, PROBE_KEEP, Sweep

SOLVED = 0.8
Value = TypeVar("Value")


def main() -> None:
    """Measure step by step, and print a table."""
    options = parse()
    model, tokenizer = load_model(options.model)
    drawn = calibrated_on(options, tokenizer)
    batches = drawn.batches()
    print(
        f"{Path(options.model).name}, {drawn.tokens:,} tokens, {torch.get_num_threads()} thread(s)"
    )
    print("\n| step | seconds | forward passes |\n|---|---|---|")
    clock = Clock()
    clock("forward pass over the tokens", lambda: forward(model, batches))
    path = options.out / "bank.safetensors"
    options.out.mkdir(parents=True, exist_ok=True)
    write_bank(clock, model, batches, path)
    bank = clock("read the bank", lambda: MomentBank.load(path))
    model.forward = refuse
    points = clock(f"sweep over {len(KEEP)} budgets", lambda: sweep(model, bank=bank, keep=KEEP))
    pruned = copy.deepcopy(model)
    recipe = next(point.recipe for point in points if point.recipe.keep == SOLVED)
    recipe = replace(recipe, schedule="one-pass")  # layer by layer the model is run
    report = clock(
        f"prune to {SOLVED:g} by the bank, in one pass",
        lambda: prune(pruned, None, recipe, bank=bank),
    )
    del model.forward, pruned.forward
    assert report.plan == next(point.plan for point in points if point.recipe.keep == SOLVED)
    if options.scratch:
        clock(
            f"prune to {SOLVED:g} from scratch, in one pass", lambda: prune(model, batches, recipe)
        )
        mine, theirs = pruned.state_dict(), model.state_dict()
        same = all(torch.equal(value, theirs[name]) for name, value in mine.items())
        print(
            f"\nplan and weights by the bank and from scratch: {'the same bits' * same or 'DIFFER'}"
        )
    print(f"\nbank: {path.stat().st_size / 1e6:,.0f} MB\n")
    for point in points:
        print(
            f"keep {point.recipe.keep:g}: predicted divergence {point.predicted_divergence:.4f}, "
            f"{point.params:,} parameters, {point.flops:.1%} of the operations"
        )


def write_bank(clock: Clock, model: nn.Module, batches: list, path: Path) -> None:
    """Calibrate, measure sensitivities, write both."""
    bank = clock("calibrate", lambda: calibrate(model, batches))
    work = Sweep(model, bank=bank, probe_keep=PROBE_KEEP)
    clock(f"sensitivities, {PROBE_KEEP:g} of each site left", lambda: work.plan(Recipe()))
    work.known.store_sensitivities(bank)
    clock("write the bank", lambda: bank.save(path))


class Clock:
    """Times steps, and prints a row for each beside the first."""

    def __init__(self) -> None:
        one = torch.get_num_threads() == 1
        self.now = time.process_time if one else time.perf_counter
        self.first: float | None = None

    def __call__(self, name: str, step: Callable[[], Value]) -> Value:
        """Run a step."""
        start = self.now()
        value = step()
        seconds = self.now() - start
        self.first = self.first or seconds
        print(f"| {name} | {seconds:.1f} | {seconds / self.first:.2f} |", flush=True)
        return value


def refuse(*given: object, **more: object) -> None:
    """Fail where a model is run."""
    raise AssertionError("the model was run")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = text_parser(__doc__, samples=64, seq_len=512)
    parser.add_argument("--out", type=Path, default=Path("out/sweep"))
    parser.add_argument(
        "--scratch", action="store_true", help="compare with a run from scratch: as long again"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
