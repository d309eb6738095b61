"""What healing gains, and whether the start matters: prune by three methods, heal each, compare.

    make healing WIKITEXT=FOLDER HEALING="--rows START:KEEP:TOKENS ..."

Perplexity on the four texts of bench.quality, in bfloat16 as there; models are pruned in float32,
and healed as `liar heal` does by default. Pruned folders and rows are kept in out/healing, and a
row that is there is not measured again; docs/data/healing.json has the table. Healed is on more of
the text that was calibrated on. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.quality.models import load
from bench.quality.record import write_whole
from bench.quality.texts import Texts, choose_texts, write_texts
from bench.quality.windows import HeldOut
from liar_ext import MomentBank, Recipe, calibrate, heal, load_pruned, prune, save_pruned
from liar_ext.calibration.folds import (
    Sequences,
    count_beside,
    fraction_of,
    of_no_text,
    random_sequences,
)
from liar_ext.calibration.generated import write_sequences

ROOT = Path(__file__).parents[1]
OUT, TABLE = ROOT / "out" / "healing", ROOT / "docs" / "data" / "healing.json"
MODEL = "SmolLM2-135M-Instruct"
# What each start is, as keywords of prune(), and how it is shown.
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "liar": ("`liar`", {}),
    "fast": ("`--preset fast`", {"preset": "fast"}),
    "flap": ("`--preset flap`", {"preset": "flap"}),
    "drop": ("`fast` without compensation", {"preset": "fast", "reconstruct": "none"}),
}
ROWS = [
    f"{start}:{keep}:{tokens}"
    for keep in ("0.8", "0.5")
    for tokens in (0, 20_000, 60_000)
    for start in ("liar", "fast", "flap", "drop")
    if tokens < 60_000 or start == "liar"
]
SEQ_LEN, SEED = 256, 0
CALIBRATED, TRAINED, JUDGING = 64, 240, 4  # sequences; more are drawn for more tokens than these
WINDOWS = 8  # of each text that is judged by


def main() -> None:
    """Measure what is missing, and write the table after each row."""
    options = parse()
    bench = Bench(options.wikitext)
    for name in options.rows:
        start, keep, tokens = name.split(":")
        wanted = {"start": start, "keep": float(keep), "tokens": int(tokens)}
        if bench.find(wanted) is None:
            print(json.dumps(bench.measure(**wanted)), flush=True)
        write(bench.rows)


class Bench:
    """A dense model, its texts, and the rows so far."""

    def __init__(self, wikitext: Path) -> None:
        write_texts(OUT / "texts")
        texts = Texts(*choose_texts(OUT / "texts", ["encyclopaedia", "news"], [], wikitext))
        self.dense, self.tokenizer, _ = load(MODEL)
        self.texts = texts
        self.drawn = self.draw(TRAINED)
        self.windows = texts.windows(self.tokenizer, seq_len=SEQ_LEN, samples=WINDOWS)
        self.banks: dict[tuple[float, float], tuple[MomentBank, float]] = {}
        self.kept = OUT / "rows.json"
        self.rows = json.loads(self.kept.read_text()) if self.kept.exists() else []
        dense = judge(self.dense, self.windows)
        if self.find({"start": "dense"}) is None:
            self.add({"start": "dense", "keep": 1.0, "tokens": 0, "texts": dense, "seconds": {}})

    def draw(self, samples: int) -> Sequences:
        """Return sequences of text to calibrate and to train on, and some that judge."""
        how = {"lone": "blocks", "self_text": 0.0, "random_tokens": 0.0, "judge": JUDGING}
        how |= {"samples": samples, "seq_len": SEQ_LEN, "seed": SEED}
        return self.texts.draw(self.dense, self.tokenizer, **how)

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row that has these values, if there is one."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row."""
        self.rows.append(row)
        write_whole(self.kept, json.dumps(self.rows, indent=1) + "\n")
        return row

    def measure(self, start: str, keep: float, tokens: int) -> dict[str, Any]:
        """Return a row, and keep it; a start that is missing is pruned first."""
        folder = OUT / f"{start}-{keep:g}"
        row = {"start": start, "keep": keep, "tokens": tokens}
        if not tokens:
            bank, before = self.bank(start)
            work, clock = copy.deepcopy(self.dense), time.process_time()
            report = prune(work, bank=bank, keep=keep, **STARTS[start][1])
            row["seconds"] = {"prune": before + time.process_time() - clock}
            save_pruned(work, folder, report.plan, report=report, overwrite=True)
        else:
            before = self.find({**row, "tokens": 0}) or self.measure(start, keep, 0)
            drawn = self.drawn if tokens <= TRAINED * SEQ_LEN else self.draw(tokens // SEQ_LEN)
            work, clock = load_pruned(folder, dtype=torch.float32), time.process_time()
            held_out, budget = drawn.judging.batches(), {"tokens": tokens}
            found = heal(work, self.dense, drawn.batches(), held_out=held_out, budget=budget)
            row["seconds"] = before["seconds"] | {"heal": time.process_time() - clock}
            row["heal"] = {name: found[name] for name in ("after", "tokens", "curve", "precision")}
        row["texts"] = judge(work, self.windows)
        return self.add(row)

    def bank(self, start: str) -> tuple[MomentBank, float]:
        """Return activation statistics, which jobs on the same text share, and what they took."""
        recipe = Recipe.build(**STARTS[start][1])
        beside = recipe.self_text, fraction_of(recipe.random_tokens, True, recipe.self_text > 0)
        if beside not in self.banks:
            clock = time.process_time()
            bank = calibrate(self.dense, self.calibration(*beside).batches())
            self.banks[beside] = bank, time.process_time() - clock
        return self.banks[beside]

    def calibration(self, self_text: float, random_tokens: float) -> Sequences:
        """Return some of the drawn sequences, evenly, and what a preset has beside them."""
        rows = torch.arange(CALIBRATED) * len(self.drawn) // CALIBRATED
        inputs = {name: value[rows] for name, value in self.drawn.inputs.items()}
        fold, source = self.drawn.fold[rows], self.drawn.source[rows]
        text = replace(self.drawn, inputs=inputs, fold=fold, source=source)
        if self_text:
            count = count_beside(CALIBRATED, self_text)
            how = {"count": count, "seq_len": SEQ_LEN, "seed": SEED}
            return text.beside(write_sequences(self.dense, self.tokenizer, **how))
        copies = random_sequences(text.input_ids.tolist(), self.tokenizer, random_tokens, SEED)
        return text.beside(of_no_text(torch.tensor([ids for _, ids in copies]))) if copies else text


def judge(model: nn.Module, windows: dict[str, HeldOut]) -> dict[str, dict[str, float]]:
    """Return perplexity and divergence from the dense model, which is judged first, by text."""
    cast = copy.deepcopy(model).to(torch.bfloat16)
    return {name: text.judge(cast) for name, text in windows.items()}


def gap(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Return the mean over the texts of log(perplexity / dense)."""
    texts = row["texts"]
    ratios = [texts[name]["perplexity"] / dense["texts"][name]["perplexity"] for name in texts]
    return sum(map(math.log, ratios)) / len(ratios)


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Write the table."""
    dense, *others = rows
    whole = {name: text["perplexity"] for name, text in dense["texts"].items()}
    titles = {"wikitext-2": "WikiText-2"}
    texts = [f"{titles.get(name, name)}, dense {value:.2f}" for name, value in whole.items()]
    cells, order = [], list(STARTS)
    others.sort(key=lambda row: (-row["keep"], order.index(row["start"]), row["tokens"]))
    for row in others:
        values = [f"{row['texts'][name]['perplexity']:,.2f}" for name in whole]
        seconds = [row["seconds"]["prune"], row["seconds"].get("heal", 0)]
        tokens = row["heal"]["tokens"] if row["tokens"] else 0
        cells.append(
            [f"{100 * (1 - row['keep']):.0f} %", STARTS[row["start"]][0], f"{tokens:,}"]
            + [*values, f"{gap(row, dense):.3f}", *(f"{each:,.0f}" for each in seconds)]
        )
    facts = {
        "command": "make healing WIKITEXT=FOLDER",
        "note": f"{MODEL}, seed {SEED}, {CALIBRATED} calibration sequences of {SEQ_LEN} tokens; "
        f"perplexity in {WINDOWS} windows of {SEQ_LEN} tokens of each text",
        "columns": ["removed", "start", "healed tokens", *texts, "mean gap", "CPU s to prune"]
        + ["CPU s to heal"],
        "rows": cells,
    }
    write_whole(TABLE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of WikiText-2")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="START:KEEP:TOKENS, in order")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
