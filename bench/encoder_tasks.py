"""What `bench/encoders.py` judges encoders by: similarity, retrieval, classification."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from assets import distinct, hold_out, title_and_body
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from liar_ext.measure import embeddings

BATCH, LONGEST = 64, 128
EPOCHS, TRAIN_BATCH, LEARNING_RATE = 2, 32, 6e-5
# Every n-th article is held out for the test, and of the others every n-th for choices.
HELD_OUT_EVERY = 7


class Pairs:
    """Spearman correlation of the cosines of pairs with their scores, or recall@1 without these."""

    def __init__(
        self,
        tokenizer,
        first: Sequence[str],
        second: Sequence[str],
        scores: Sequence[float] | None = None,
    ) -> None:
        self.tokenizer, self.scores = tokenizer, scores
        self.first, self.second = first, second

    @classmethod
    def of_sts(cls, tokenizer, rows: Sequence[tuple[float, str, str]]) -> Pairs:
        """Return the task of rows of STS-B."""
        scores, first, second = zip(*rows, strict=True)
        return cls(tokenizer, first, second, scores)

    def __call__(self, model) -> float:
        """Return it for a model."""
        first, second = (embed(model, self.tokenizer, each) for each in (self.first, self.second))
        return next(iter(embeddings.pair_quality(first, second, self.second, self.scores).values()))


class Sentiment:
    """Accuracy of a classifier on sentences with labels."""

    def __init__(self, path: Path, tokenizer) -> None:
        self.rows = sorted(read_tsv(path), key=lambda row: len(row[0]))
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, model) -> float:
        """Return it for a model."""
        right = 0
        for at in range(0, len(self.rows), BATCH):
            texts, labels = zip(*self.rows[at : at + BATCH], strict=True)
            predicted = model(**encode(self.tokenizer, texts)).logits.argmax(-1)
            right += int((predicted == torch.tensor(labels)).sum())
        return right / len(self.rows)


def embed(model, tokenizer, texts: Sequence[str]) -> Tensor:
    """Return embeddings, pooled as the folder of the model says; like lengths share a batch."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    batches = [[texts[at] for at in order[i : i + BATCH]] for i in range(0, len(order), BATCH)]
    found = embeddings.embed(model, [encode(tokenizer, each) for each in batches])
    return found[torch.tensor(order).argsort()]


def encode(tokenizer, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return padded model inputs."""
    settings = {"padding": True, "truncation": True, "max_length": LONGEST}
    return dict(tokenizer(list(texts), return_tensors="pt", **settings))


def fine_tuned(encoder: Path, data: Path, tokenizer, out: Path) -> tuple:
    """Return the encoder fine-tuned on SST-2, kept from an earlier run, and training sentences.

    A quarter of an hour on one core the first time.
    """
    folder, train = out / "sst2-dense", read_tsv(data / "train.tsv")
    sentences = [text for text, _ in train]
    if (folder / "config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval(), sentences
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * (len(train) // TRAIN_BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(EPOCHS):
        # Sentences of like length share a batch, so that little of it is padding.
        noise = (20 * torch.rand(len(train))).tolist()
        order = sorted(range(len(train)), key=lambda i: len(train[i][0]) + noise[i])
        for at in (TRAIN_BATCH * torch.randperm(len(train) // TRAIN_BATCH)).tolist():
            texts, labels = zip(*(train[i] for i in order[at : at + TRAIN_BATCH]), strict=True)
            output = model(**encode(tokenizer, texts), labels=torch.tensor(labels))
            output.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval(), sentences


def news_apart(folder: Path, judge: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return articles to calibrate on, and (title, body) of those to judge by: all, for ``all``.

    An article that has the title or the body of one that judges, for choices or at the end, is in
    no calibration text; of those that judge no two have one title or body.
    """
    paths = sorted(path for path in folder.rglob("*.txt") if path.name.lower() != "readme.txt")
    articles = [path.read_text(encoding="latin-1").strip() for path in paths]
    if judge == "all":
        return [], [title_and_body(article) for article in distinct(articles)]
    rest, test = hold_out(articles, HELD_OUT_EVERY)
    rest, dev = hold_out(rest, HELD_OUT_EVERY)
    return rest, [title_and_body(article) for article in (test if judge == "test" else dev)]


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
