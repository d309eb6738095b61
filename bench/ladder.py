"""Whether a walk that leaves the ladder of λ where the held-out error rises finds its least error.

Prunes the first layers of a model layer by layer, tries the whole ladder at every site as well,
and says how many λ the walk tried and where the whole ladder would have chosen otherwise.

    python bench/ladder.py MODEL --calibration TEXT --layers 6
"""

from __future__ import annotations

import math
from collections import Counter
from unittest import mock

import torch
from common import calibrated_on, keep_layers, text_parser

from liar_ext import prune
from liar_ext.checkpoint import load_model
from liar_ext.reconstruction import ridge
from liar_ext.reconstruction.ladder import Choice, choose, held_out_errors, least_held_out


def main() -> None:
    """Print what was chosen, tried and missed."""
    parser = text_parser(__doc__, samples=16, seq_len=256)
    parser.add_argument("--layers", type=int, help="layers that run; all, if not given")
    parser.add_argument("--keep", type=float, default=0.8)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    keep_layers(model, options.layers)
    batches = calibrated_on(options, tokenizer).batches()
    taken, tried, missed = Counter(), Counter(), []

    def beside(parabolas, ladder, low, high, whole) -> Choice:
        choice = choose(parabolas, ladder, low, high, whole=whole)
        every = torch.stack([parabolas(damp) for damp in ladder], 1)
        errors, _ = held_out_errors(every, low, high)
        best = least_held_out(errors, [*ladder, *ladder])
        taken[choice.damp] += 1
        tried[choice.tried - (ladder[-1] == math.inf)] += 1
        if ladder[best % len(ladder)] != choice.damp:
            missed.append(float(choice.held_out / errors[:, best].sum()) - 1)
        return choice

    with mock.patch.object(ridge, "choose", beside):
        prune(model, batches, options.keep, criterion="wifv", allocation="uniform")
    sites = sum(tried.values())
    mean = sum(count * times for count, times in tried.items()) / max(1, sites)
    print(f"{sites} sites, λ taken: {dict(sorted(taken.items()))}")
    print(f"finite λ tried: {mean:.2f} on average, {dict(sorted(tried.items()))}")
    print(f"missed: {len(missed)}, their held-out error above the least: {missed}")


if __name__ == "__main__":
    main()
