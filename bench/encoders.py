"""Encoders at half of their parameters: accuracy on SST-2, Spearman correlation on STS-B.

Takes a sentence encoder (all-MiniLM-L6-v2, say) as a folder, and the two data sets as folders with
`train.tsv`, `test.tsv` (sentence, label) and `sts-train.csv`, `sts-test.csv` (tab-separated, score
in column 5, sentences in 6 and 7). For SST-2 the encoder is first fine-tuned, once, and kept.
Both tasks calibrate on training sentences without labels and are measured on test data.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from liar_ext import prune

METHODS = {
    "none": {"reconstruct": "none"},
    "bias": {"reconstruct": "bias"},
    "linear": {"reconstruct": "linear"},
    "affine": {"reconstruct": "affine"},
}
EPOCHS, BATCH, LEARNING_RATE = 2, 32, 6e-5


def main() -> None:
    """Run both tasks and write a table."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    rows = sentiment(options, tokenizer) + similarity(options, tokenizer)
    (options.out / "encoders.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = markdown(rows)
    (options.out / "encoders.md").write_text(table)
    print(table)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("encoder", type=Path, help="folder of the sentence encoder")
    add("--sst2", type=Path, required=True)
    add("--stsb", type=Path, required=True)
    add("--keep", type=float, default=0.5)
    add("--samples", type=int, default=4096, help="calibration sentences")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/encoders"))
    return parser.parse_args()


def sentiment(options: argparse.Namespace, tokenizer) -> list[dict]:
    """Accuracy on the SST-2 test sentences, dense and pruned."""
    train, test = (read_tsv(options.sst2 / name) for name in ("train.tsv", "test.tsv"))
    model = fine_tuned(options, tokenizer, train)

    @torch.no_grad()
    def accuracy(model) -> float:
        right = 0
        for at in range(0, len(test), 128):
            texts, labels = zip(*test[at : at + 128], strict=True)
            predicted = model(**encode(tokenizer, texts)).logits.argmax(-1)
            right += int((predicted == torch.tensor(labels)).sum())
        return right / len(test)

    sentences = [text for text, _ in train]
    return compare("SST-2 accuracy", model, accuracy, sentences, tokenizer, options)


def similarity(options: argparse.Namespace, tokenizer) -> list[dict]:
    """Spearman correlation of cosine similarity with the human score, on the STS-B test pairs."""
    train, test = (read_sts(options.stsb / name) for name in ("sts-train.csv", "sts-test.csv"))

    @torch.no_grad()
    def embed(model, texts: Sequence[str]) -> Tensor:
        parts = []
        for at in range(0, len(texts), 128):
            inputs = encode(tokenizer, texts[at : at + 128])
            mask = inputs["attention_mask"][..., None]
            pooled = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(pooled, dim=-1))
        return torch.cat(parts)

    def spearman(model) -> float:
        scores, left, right = zip(*test, strict=True)
        cosine = (embed(model, left) * embed(model, right)).sum(-1)
        return float(spearmanr(cosine.numpy(), scores).statistic)

    sentences = [text for _, *pair in train for text in pair]
    model = AutoModel.from_pretrained(options.encoder).eval()
    return compare("STS-B Spearman", model, spearman, sentences, tokenizer, options)


def compare(
    task: str,
    dense,
    measure: Callable,
    sentences: Sequence[str],
    tokenizer,
    options: argparse.Namespace,
) -> list[dict]:
    """Measure the dense model and every method on a copy of it."""
    before = measure(dense)
    rows = []
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(sentences), generator=generator)[: options.samples].tolist()
    texts = [sentences[i] for i in chosen]
    batches = [encode(tokenizer, texts[at : at + 64]) for at in range(0, len(texts), 64)]
    for name, settings in METHODS.items():
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        report = prune(model, batches, options.keep, **settings)
        seconds = time.perf_counter() - start
        after = measure(model)
        params = report.params
        rows.append(
            {
                "task": task,
                "method": name,
                "keep": params["prunable_after"] / params["prunable_before"],
                "dense": before,
                "pruned": after,
                "retained": after / before,
                "calibration_tokens": report.settings["calibration_tokens"],
                "seed": options.seed,
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
    return rows


def fine_tuned(options: argparse.Namespace, tokenizer, train: list[tuple[str, int]]):
    """Return the encoder fine-tuned on SST-2, from the folder of an earlier run if there is one."""
    folder = options.out / "sst2-dense"
    if (folder / "config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    torch.manual_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(options.encoder, num_labels=2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(train)).tolist()
        for at in range(0, len(order) - BATCH + 1, BATCH):
            texts, labels = zip(*(train[i] for i in order[at : at + BATCH]), strict=True)
            output = model(**encode(tokenizer, texts), labels=torch.tensor(labels))
            output.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


def encode(tokenizer, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return padded model inputs."""
    return dict(
        tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    )


def read_tsv(path: Path) -> list[tuple[str, int]]:
    """Return (sentence, label) rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = (line.rsplit("\t", 1) for line in lines)
    return [(text, int(label)) for text, label in rows if label in ("0", "1")]


def read_sts(path: Path) -> list[tuple[float, str, str]]:
    """Return (score, sentence, sentence) rows."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(float(row[4]), row[5], row[6]) for row in rows]


def markdown(rows: list[dict]) -> str:
    """Return the table."""
    lines = [
        "| task | method | kept | dense | pruned | retained | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['task']} | {row['method']} | {row['keep']:.3f} | {row['dense']:.4f} "
            f"| {row['pruned']:.4f} | {row['retained']:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
