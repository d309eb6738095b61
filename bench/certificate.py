"""The certificate: what a job says of itself, beside what text shows that no decision has seen.

For several amounts of calibration text, and every text to measure on: prune by the default
schedule, `--certify` being that text. The first text is a third fold, documents of the calibration
text that nothing else is drawn from, as `liar prune --certify` draws it; `--fresh` names others, of
the same kind or of another. A site's held-out error, by which λ was chosen, stands beside its
error on that text, and the divergence of the whole model beside that on the third fold. All jobs of
one amount are the same job, which the bench checks. Writes certificate.json and certificate.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from common import calibrated_on, parser_of, table, write_json

from liar_ext import perplexity, prune
from liar_ext.calibration.documents import check_apart, document_digests, read_documents
from liar_ext.calibration.texts import evaluation_sequences
from liar_ext.checkpoint import load_model
from liar_ext.models.recipe_fields import SCHEDULES

THIRD_FOLD = "third fold"
COLUMNS = (
    "calibration tokens",
    "measured on",
    "error of a site, held out",
    "on that text",
    "that / held out: mean (lowest to highest)",
    "sites within 10 %",
    "divergence, nats",
    "perplexity (dense)",
)


def main() -> None:
    """Measure, and write after every row."""
    options = parse()
    rows = []
    for row in measure(options):
        rows.append(row)
        write_json(options.out / "certificate.json", rows)
        (options.out / "certificate.md").write_text(markdown(rows))
        print(markdown(rows).splitlines()[-1], flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", help="model folder, hub id or GGUF file")
    add("--calibration", nargs="+", required=True)
    add("--fresh", nargs="+", default=[], help="texts that nothing is calibrated on")
    add("--samples", nargs="+", type=int, default=[16, 64], help="calibration sequences")
    add("--certify", type=int, default=16, help="sequences of each text to measure on")
    add("--seq-len", type=int, default=512)
    add("--keep", type=float, default=0.8)
    add("--criterion", default="wifv")
    add("--allocation", default="uniform", help="curve takes the most time by far")
    add("--schedule", choices=SCHEDULES, default="auto")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/certificate"))
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Yield one row per amount of calibration text and text to measure on."""
    model, tokenizer = load_model(options.model)
    sources = [read_documents(source) for source in options.calibration]
    texts = {}
    for source in options.fresh:
        documents = read_documents(source)
        check_apart(document_digests(text for some in sources for text in some), documents)
        texts[Path(source).stem] = evaluation_sequences(
            documents, tokenizer, seq_len=options.seq_len, samples=options.certify
        ).batches()
    dense = {name: perplexity(model, batches)["perplexity"] for name, batches in texts.items()}
    for samples in options.samples:
        how = {"samples": samples, "seed": options.seed, "certify": options.certify}
        # Held-out errors are of text then, as those on fresh text.
        sequences = calibrated_on(options, tokenizer, random_tokens=0.0, **how)
        plan = None
        for name, fresh in {THIRD_FOLD: sequences.certification.batches(), **texts}.items():
            work, start = copy.deepcopy(model), time.process_time()
            report = prune(
                work,
                sequences.batches(),
                options.keep,
                certify_on=fresh,
                criterion=options.criterion,
                allocation=options.allocation,
                schedule=options.schedule,
                seed=options.seed,
            )
            seconds = time.process_time() - start
            assert plan in (None, report.plan), f"the job with {name} is another job"
            plan = report.plan
            yield {
                "model": Path(options.model).name,
                "calibration": [Path(source).name for source in options.calibration],
                "tokens": sequences.tokens,
                "seq_len": options.seq_len,
                "seed": options.seed,
                "keep": options.keep,
                "method": f"{options.criterion}+{options.allocation}, "
                f"{report.settings['schedule']}",
                "text": name,
                "seconds": seconds,
                "divergence": report.evaluation["certified"]["divergence"],
                "perplexity": [dense[name], perplexity(work, fresh)["perplexity"]]
                if name in dense
                else None,
                "sites": [
                    {"name": row.name, "held_out": row.holdout_error, "fresh": row.certified_error}
                    for row in report.sites
                    if row.units_after < row.units_before
                ],
            }


def summary(row: dict) -> dict[str, float]:
    """Return the numbers of a row over all its sites; means are geometric."""

    def mean(values: Sequence[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(values))

    ratios = [site["fresh"] / site["held_out"] for site in row["sites"]]
    return {
        "held_out": mean([site["held_out"] for site in row["sites"]]),
        "fresh": mean([site["fresh"] for site in row["sites"]]),
        "ratio": mean(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "within": sum(abs(ratio - 1) <= 0.1 for ratio in ratios) / len(ratios),
    }


def markdown(rows: Sequence[dict]) -> str:
    """Return the table."""
    first = rows[0]
    said = (
        f"{first['model']}, {first['method']}, keep {first['keep']}: calibrated on "
        f"{', '.join(first['calibration'])}, sequences of {first['seq_len']}, seed "
        f"{first['seed']}. Errors of sites are relative to the energy of their outputs."
    )
    cells = []
    for row in rows:
        s = summary(row)
        judged = "–"
        if row["perplexity"]:
            judged = f"{row['perplexity'][1]:.2f} ({row['perplexity'][0]:.2f})"
        errors = f"{row['tokens']:,}", row["text"], f"{s['held_out']:.4f}", f"{s['fresh']:.4f}"
        ratios = f"{s['ratio']:.2f} ({s['low']:.2f} to {s['high']:.2f})", f"{s['within']:.0%}"
        cells.append([*errors, *ratios, f"{row['divergence']:.3f}", judged])
    return f"{said}\n\n{table(COLUMNS, cells)}\n"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
