"""Options of the bench, and its short form."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.quality.methods import FLAP
from bench.quality.models import NAMED

DESCRIPTION = """Prune models by several methods and judge what comes out by what users feel.

A row is one model, seed, fraction removed and method: perplexity, bits per byte and divergence from
the dense model on four texts; with --questions the accuracy on a file of questions of several
choices; how many tokens 64 greedy continuations go as the dense model's. Its summary is the mean
over the texts of log(perplexity / dense).

A method is liar, which is what liar prune does by default, or criterion+allocation+mode, which is
solved in one pass, on the named text alone; then +FIELD=VALUE for any field of a recipe.
+layerwise, +one-pass and +equal are short for +schedule=layerwise, +schedule=one-pass and
+uniform_layers=true; the tile is 1 unless it is named. "others" stands for configurations of ours
after what others publish, "steps" for ablations.

Rows are kept in OUT/quality.json, whole at any time: a run that was killed goes on where it was,
and rows that are there are not measured again. OUT/quality.md has the tables, OUT/quality.png a
picture of the summary. Seconds are CPU seconds of all that a method needs, calibration included.
"""
SHORT = {
    "models": ["SmolLM2-135M-Instruct"],
    "seeds": [0],
    "ratios": [0.2],
    "samples": 32,
    "eval_samples": 4,
    "question_count": 200,
    "prompts": 32,
    "out": Path("out/quality-short"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(NAMED), help="names, folders, hub ids or GGUF files")
    add("--methods", nargs="+", default=["liar", "liar+one-pass", FLAP])
    add("--ratios", nargs="+", type=float, default=[0.2, 0.5], help="fractions removed")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="of the calibration set")
    add("--calibration", nargs="+", default=["encyclopaedia"], metavar="TEXT",
        help="encyclopaedia, news, self, or sources of one's own")  # fmt: skip
    add("--samples", type=int, default=64, help="calibration sequences")
    add("--judge", type=int, default=0,
        help="sequences that decide the schedule auto; needs --lone blocks")  # fmt: skip
    add("--lone", choices=("halves", "blocks"), default="halves",
        help="how a calibration text of one document is split into folds")  # fmt: skip
    add("--wikitext", type=Path, metavar="FOLDER",
        help="has WikiText-2, which then is the encyclopaedia")  # fmt: skip
    add("--eval", nargs="+", default=[], metavar="NAME=TEXT",
        help="texts to judge by, instead of the four")  # fmt: skip
    add("--eval-samples", type=int, default=8, help="windows of each text to judge by")
    add("--eval-dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="that models are judged in, the dense one as well")  # fmt: skip
    add("--seq-len", type=int, default=512)
    add("--questions", type=Path, metavar="FILE",
        help="JSON lines with question, choices and answer, as of ARC-easy")  # fmt: skip
    add("--question-count", type=int, default=500, help="evenly drawn")
    add("--prompts", type=int, default=64, help="to continue, from all texts to judge by")
    add("--texts", type=Path, default=Path("out/quality/texts"), help="where texts are written to")
    add("--out", type=Path, default=Path("out/quality"))
    add("--short", action="store_true",
        help="one model, one seed, one ratio, less text: twenty minutes of one core")  # fmt: skip
    if parser.parse_known_args(arguments)[0].short:
        parser.set_defaults(**SHORT)
    return parser.parse_args(arguments)
