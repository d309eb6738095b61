"""Perplexity of pruned models: methods × fractions kept × seeds, one calibration per seed.

A method is written criterion+allocation+reconstruction. Some are what others publish:

    wanda+uniform+none      Wanda-sp
    wifv+global+bias        FLAP
    wanda+uniform+linear    one of GRAIL's configurations
    wifv+global+linear      another

`liar` is the default of this package. All methods of a seed see the same calibration text; the
texts to evaluate on share no document with it. Writes quality.json, quality.md and quality.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

from liar_ext import Budget, allocate, apply_plan, calibrate, perplexity, reconstruct, score, sites
from liar_ext.checkpoint import load_model
from liar_ext.losses import measure_losses, probe_batches
from liar_ext.reconstruction import with_bias
from liar_ext.texts import calibration_sequences, evaluation_sequences, read_documents

PEERS = ("wanda+uniform+none", "wifv+global+bias", "wanda+uniform+linear", "wifv+global+linear")
DEFAULT = {"liar": "wifv+uniform+linear"}


def main() -> None:
    """Measure, and write after every row, so that an interrupted run keeps what it has."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure(options):
        rows.append(row)
        print(
            f"{row['method']:28} keep {row['ratio']:.2f} seed {row['seed']} {row['text']}: "
            f"perplexity {row['perplexity']:.2f}, dense {row['dense']:.2f}, {row['seconds']:.0f} s",
            flush=True,
        )
        (options.out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "quality.md").write_text(markdown(rows))
    plot(rows, options.out / "quality.png")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="model folder, hub id or GGUF file")
    add("--calibration", nargs="+", required=True)
    add("--eval", nargs="+", required=True, help="texts to evaluate on")
    add("--methods", nargs="+", default=["liar", *PEERS])
    add("--keep", nargs="+", type=float, default=[0.8, 0.7, 0.5])
    add("--sites", choices=("all", "attn", "mlp"), default="all")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--samples", type=int, default=128)
    add("--eval-samples", type=int, default=None)
    add("--seq-len", type=int, default=512)
    add("--out", type=Path, default=Path("out/quality"))
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Yield one row per method, fraction, seed and text."""
    model, tokenizer = load_model(options.model)
    kinds = ("attn", "mlp") if options.sites == "all" else (options.sites,)
    at = sites(model, kinds)
    held_out = {}
    for source in options.eval:
        windows = evaluation_sequences(
            read_documents(source),
            tokenizer,
            seq_len=options.seq_len,
            samples=options.eval_samples,
        )
        held_out[Path(source).name] = windows.batches()
    dense = {text: perplexity(model, batches) for text, batches in held_out.items()}
    sources = [read_documents(source) for source in options.calibration]
    for seed in options.seeds:
        calibration = calibration_sequences(
            sources, tokenizer, samples=options.samples, seq_len=options.seq_len, seed=seed
        )
        start = time.perf_counter()
        bank = calibrate(model, calibration.batches(), at)
        calibrating = time.perf_counter() - start
        for name in options.methods:
            criterion, allocation, mode = DEFAULT.get(name, name).split("+")
            for keep in options.keep:
                start = time.perf_counter()
                scores = score(model, bank, at, criterion, seed=seed)
                losses = None
                if allocation == "curve":
                    probe = probe_batches(calibration.batches())
                    losses, _ = measure_losses(
                        model, bank, at, scores, Budget(keep), probe, mode=mode
                    )
                plan = allocate(
                    at,
                    scores,
                    Budget(keep),
                    allocation,
                    model_type=model.config.model_type,
                    losses=losses,
                )
                plan = with_bias(plan, model, mode)
                weights, _ = reconstruct(model, bank, plan, mode=mode)
                pruned = copy.deepcopy(model)
                apply_plan(pruned, plan, weights)
                seconds = calibrating + time.perf_counter() - start
                for text, batches in held_out.items():
                    after = perplexity(pruned, batches)
                    yield {
                        "model": Path(options.model).name,
                        "method": name,
                        "ratio": keep,
                        "sites": options.sites,
                        "text": text,
                        "seq_len": options.seq_len,
                        "tokens": after["tokens"],
                        "calibration_tokens": bank.source["tokens"],
                        "seed": seed,
                        "dense": dense[text]["perplexity"],
                        "perplexity": after["perplexity"],
                        "seconds": seconds,
                    }


def markdown(rows: list[dict]) -> str:
    """Return one table per text: methods down, fractions kept across, mean over seeds."""
    first = rows[0]
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        chosen = [row for row in rows if row["text"] == text]
        ratios = list(dict.fromkeys(row["ratio"] for row in chosen))
        lines += [
            f"Perplexity of {first['model']} on {text}, {chosen[0]['tokens']:,} tokens in windows "
            f"of {first['seq_len']}; dense {chosen[0]['dense']:.2f}. Calibrated on "
            f"{first['calibration_tokens']:,} tokens, seeds "
            f"{', '.join(dict.fromkeys(str(row['seed']) for row in rows))}. "
            f"Columns: fraction kept of the parameters of {first['sites']} sites.",
            "",
            "| method | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
            "|---|" + "---|" * len(ratios),
        ]
        for method in dict.fromkeys(row["method"] for row in chosen):
            cells = []
            for ratio in ratios:
                found = [
                    row["perplexity"]
                    for row in chosen
                    if row["method"] == method and row["ratio"] == ratio
                ]
                cells.append(f"{sum(found) / len(found):.2f}" if found else "")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw perplexity against the fraction kept, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = rows[0]["text"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points: dict[float, list[float]] = {1.0: [rows[0]["dense"]]}
        for row in rows:
            if row["method"] == method and row["text"] == text:
                points.setdefault(row["ratio"], []).append(row["perplexity"])
        keeps = sorted(points)
        means = [sum(points[keep]) / len(points[keep]) for keep in keeps]
        axes.plot(keeps, means, marker="o", label=method)
    axes.set(xlabel="fraction of prunable parameters kept", ylabel="perplexity", yscale="log")
    axes.set_title(f"{rows[0]['model']} on {text}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
