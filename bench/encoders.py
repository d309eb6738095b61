"""Encoders at half of their parameters: accuracy on SST-2, Spearman correlation on STS-B.

Takes a sentence encoder (all-MiniLM-L6-v2, say) as a folder, and the two data sets as folders with
`train.tsv`, `test.tsv` (sentence, label) and `sts-train.csv`, `sts-test.csv` (tab-separated, score
in column 5, sentences in 6 and 7); a task whose folder is not given is left out. For SST-2 the
encoder is first fine-tuned, once, and kept. Both tasks calibrate on training sentences without
labels and are measured on test data. The rows none to affine are wifv+uniform and a form of
reconstruction; the full method allocates by curves, and obs is another choice of units. With
`--keep-hidden` there are two more rows for each fraction of the hidden size: hidden features
sliced, and all that read them solved, and nothing else removed. What they keep is of all
parameters, not of the units'.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from liar_ext import Plan, apply_plan, narrow, prune
from liar_ext.checkpoint.fingerprint import count_params

# All of them with tile 1, as the rows of docs/quality.md.
PLAIN = {"criterion": "wifv", "allocation": "uniform"}
METHODS = {
    "none": {**PLAIN, "reconstruct": "none"},
    "bias": {**PLAIN, "reconstruct": "bias"},
    "linear": {**PLAIN, "reconstruct": "linear"},
    "affine": {**PLAIN, "reconstruct": "affine"},
    "affine, obs": {"criterion": "obs", "allocation": "uniform"},
    "full, obs": {"criterion": "obs"},
    "full (the default)": {},
    "full, layerwise": {"schedule": "layerwise"},
}
EPOCHS, BATCH, LEARNING_RATE = 2, 32, 6e-5


def main() -> None:
    """Run both tasks and write a table."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    rows: list[dict] = []
    tasks = {similarity: options.stsb, sentiment: options.sst2}
    for task in [task for task, folder in tasks.items() if folder is not None]:
        for row in task(options, tokenizer):
            rows.append(row)
            print(row, flush=True)
            (options.out / "encoders.json").write_text(json.dumps(rows, indent=1) + "\n")
            (options.out / "encoders.md").write_text(markdown(rows))
    print(markdown(rows))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("encoder", type=Path, help="folder of the sentence encoder")
    add("--sst2", type=Path)
    add("--stsb", type=Path)
    add("--keep", type=float, default=0.5)
    add("--samples", type=int, default=4096, help="calibration sentences")
    add("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    add("--keep-hidden", nargs="+", type=float, default=[], help="fractions of the hidden size")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/encoders"))
    options = parser.parse_args()
    if options.sst2 is None and options.stsb is None:
        parser.error("give the folder of a task: --sst2, --stsb, or both")
    return options


def sentiment(options: argparse.Namespace, tokenizer) -> Iterator[dict]:
    """Accuracy on the SST-2 test sentences, dense and pruned."""
    train, test = (read_tsv(options.sst2 / name) for name in ("train.tsv", "test.tsv"))
    model = fine_tuned(options, tokenizer, train)

    @torch.no_grad()
    def accuracy(model) -> float:
        right, rows = 0, sorted(test, key=lambda row: len(row[0]))
        for at in range(0, len(rows), 128):
            texts, labels = zip(*rows[at : at + 128], strict=True)
            predicted = model(**encode(tokenizer, texts)).logits.argmax(-1)
            right += int((predicted == torch.tensor(labels)).sum())
        return right / len(test)

    sentences = [text for text, _ in train]
    return compare("SST-2 accuracy", model, accuracy, sentences, tokenizer, options)


def similarity(options: argparse.Namespace, tokenizer) -> Iterator[dict]:
    """Spearman correlation of cosine similarity with the human score, on the STS-B test pairs."""
    train, test = (read_sts(options.stsb / name) for name in ("sts-train.csv", "sts-test.csv"))

    @torch.no_grad()
    def embed(model, texts: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for at in range(0, len(texts), 128):
            inputs = encode(tokenizer, texts[at : at + 128])
            mask = inputs["attention_mask"][..., None]
            pooled = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(pooled, dim=-1)
            found |= zip(texts[at : at + 128], unit, strict=True)
        return found

    def spearman(model) -> float:
        of = embed(model, sorted({text for _, *pair in test for text in pair}, key=len))
        cosine = [float(of[left] @ of[right]) for _, left, right in test]
        return float(spearmanr(cosine, [score for score, *_ in test]).statistic)

    sentences = list(dict.fromkeys(text for _, *pair in train for text in pair))
    model = AutoModel.from_pretrained(options.encoder).eval()
    return compare("STS-B Spearman", model, spearman, sentences, tokenizer, options)


def compare(
    task: str,
    dense,
    measure: Callable,
    sentences: Sequence[str],
    tokenizer,
    options: argparse.Namespace,
) -> Iterator[dict]:
    """Measure the dense model and every method on a copy of it."""
    before = measure(dense)

    def row(method: str, model, keep: float, tokens: int, seconds: float) -> dict:
        after = measure(model)
        return {
            "task": task,
            "method": method,
            "keep": keep,
            "dense": before,
            "pruned": after,
            "retained": after / before,
            "calibration_tokens": tokens,
            "seed": options.seed,
            "seconds": seconds,
        }

    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(sentences), generator=generator)[: options.samples].tolist()
    texts = sorted((sentences[i] for i in chosen), key=len)  # little padding
    batches = [encode(tokenizer, texts[at : at + 64]) for at in range(0, len(texts), 64)]
    for name in options.methods:
        model = copy.deepcopy(dense)
        start = time.process_time()
        report = prune(model, batches, options.keep, tile=1, **METHODS[name])
        seconds = time.process_time() - start
        keep = report.params["prunable_after"] / report.params["prunable_before"]
        yield row(name, model, keep, report.settings["calibration_tokens"], seconds)
    for fraction in options.keep_hidden:
        start = time.process_time()
        done = narrow(dense, batches, fraction)
        seconds = time.process_time() - start
        plan = Plan(dense.config.model_type, "auto", {}, hidden=done.kept)
        for name, weights in (("sliced", {}), ("solved", done.weights)):
            model = copy.deepcopy(dense)
            apply_plan(model, plan, weights)
            method = f"{len(done.kept.kept)} of {done.kept.units} hidden features, {name}"
            keep = count_params(model) / count_params(dense)
            yield row(method, model, keep, done.source["tokens"], seconds)


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
        # Sentences of like length share a batch, so that little of it is padding.
        noise = (20 * torch.rand(len(train))).tolist()
        order = sorted(range(len(train)), key=lambda i: len(train[i][0]) + noise[i])
        for at in (BATCH * torch.randperm(len(train) // BATCH)).tolist():
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
        "| task | method | kept | tokens | dense | pruned | retained | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['task']} | {row['method']} | {row['keep']:.3f} "
            f"| {row['calibration_tokens']:,} | {row['dense']:.4f} "
            f"| {row['pruned']:.4f} | {row['retained']:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
