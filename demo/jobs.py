"""What pruning without retraining is good for: two jobs on real models, in lines to repeat.

1. all-MiniLM-L6-v2, a sentence encoder, at half of the parameters of its heads and channels, and
   with 16,384 of its 30,522 tokens: retrieval and sentences per second.
2. SmolLM2-135M-Instruct, a causal language model, at 90 %, with the presets fast and balanced:
   perplexity, tokens per second, and how each goes on with the same openings.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import time
from pathlib import Path

import decoder
import encoder
import tables
import torch
from transformers.utils import logging as transformers_logging

from liar_ext import cli, load_pruned
from liar_ext.calibration.documents import read_documents
from liar_ext.checkpoint import load_model

# What is done, and about how many seconds each takes on two cores.
STAGES = {
    "Prune all-MiniLM-L6-v2 to half": 35,
    "Measure retrieval and speed": 19,
    "Prune SmolLM2 to 90 %, preset fast": 39,
    "Prune SmolLM2 to 90 %, preset balanced": 200,
    "Measure perplexity, speed and continuations": 50,
}


class Stages:
    """Says which stage begins, and how long the rest takes at the pace of those before."""

    def __init__(self, expected: dict[str, float]) -> None:
        self._expected = expected
        self._started = time.perf_counter()
        self._last: str | None = None
        self._next = iter(expected)
        self.seconds: dict[str, float] = {}

    def next(self) -> None:
        """Begin the next stage."""
        self.end()
        self._last = next(self._next)
        number = len(self.seconds) + 1
        done = sum(self._expected[name] for name in self.seconds)
        # The first few seconds tell nothing.
        pace = sum(self.seconds.values()) / done if done > 20 else 1.0
        left = pace * (sum(self._expected.values()) - done)
        print(
            f"\n── {number} of {len(self._expected)} · {self._last} · "
            f"about {tables.minutes(left)} left ──",
            flush=True,
        )

    def end(self) -> None:
        """End the stage that was begun last, if there is one."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds[self._last] = now - self._started
        self._started = now


def main() -> None:
    """Run both jobs; write what was measured as JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--texts", type=Path, required=True, help="what bench/assets.py wrote")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    out, texts = options.out, {path.stem: path for path in options.texts.glob("*.jsonl")}
    be_quiet()
    print(
        f"Two jobs with {torch.get_num_threads()} threads, some "
        f"{tables.minutes(sum(STAGES.values()))} on two idle cores. All results go to {out}/."
    )
    stages = Stages(STAGES)
    articles = read_documents(str(texts["held_out_news"]))
    results = {
        "encoder": run_encoder(options.encoder, out, texts, articles, stages),
        "decoder": run_decoder(options.model, out, texts, articles, stages),
    }
    stages.end()
    results |= {"seconds": stages.seconds, "threads": torch.get_num_threads()}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report = tables.report(results)
    (out / "results.md").write_text(report, encoding="utf-8")
    print(f"\n{report}\nAll of this: {out / 'results.md'}; numbers: {out / 'results.json'}")


def run_encoder(
    source: str, out: Path, texts: dict[str, Path], articles: list[str], stages: Stages
) -> dict:
    """Prune the encoder to half, tokens too, and compare it with the dense one."""
    folder = out / "MiniLM-half"
    lines = [
        f"liar prune {source} \\\n    --calibration {texts['news']} \\\n"
        f"    --samples 128 --seq-len 128 --keep 0.5 --keep-vocab 16k --out {folder} --overwrite",
        ">>> from liar_ext import load_pruned",
        f'>>> encoder = load_pruned("{folder}")',
    ]
    stages.next()
    liar(lines[0])
    stages.next()
    models = {"dense": load_model(source), "half": load_model(folder)}
    return {"lines": lines, "models": encoder.compare(models, articles)}


def run_decoder(
    source: str, out: Path, texts: dict[str, Path], articles: list[str], stages: Stages
) -> dict:
    """Prune the language model to 90 % by two presets, and compare all three."""
    folders, lines = {}, []
    for preset in ("fast", "balanced"):
        folder = folders[f"90 %, {preset}"] = out / f"SmolLM2-90-{preset}"
        lines.append(
            f"liar prune {source} \\\n    --calibration {texts['web']} {texts['news']} \\\n"
            f"    --samples 32 --seq-len 256 --keep 0.9 --preset {preset} \\\n"
            f"    --out {folder} --overwrite"
        )
        stages.next()
        liar(lines[-1])
    stages.next()
    dense, tokenizer = load_model(source)
    models = {"dense": dense} | {name: load_pruned(folder) for name, folder in folders.items()}
    lines.append(f"liar eval {folder} --text {texts['held_out_news']} --samples {decoder.WINDOWS}")
    return {"lines": lines, **decoder.compare(models, tokenizer, articles)}


def liar(command: str) -> None:
    """Run one ``liar`` command, as it is printed, in this process."""
    print(f"$ {command}", flush=True)
    code = cli.main(shlex.split(command.replace("\\\n", " "))[1:])
    if code:
        raise SystemExit(code)


def be_quiet() -> None:
    """Leave out what transformers says at every load; ``liar`` shows the progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
