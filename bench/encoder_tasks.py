"""What `bench/encoders.py` judges encoders by: similarity, retrieval, classification."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForSequenceClassification

BATCH, LONGEST = 64, 128
EPOCHS, TRAIN_BATCH, LEARNING_RATE = 2, 32, 6e-5
# Every n-th article is held out for the test, and of the others every n-th for choices.
HELD_OUT_EVERY = 7


class Similarity:
    """Spearman correlation of the cosine similarity of pairs with their scores."""

    def __init__(self, rows: Sequence[tuple[float, str, str]], tokenizer, cls: bool) -> None:
        self.rows, self.tokenizer, self.cls = rows, tokenizer, cls

    def __call__(self, model) -> float:
        """Return it for a model."""
        left, right = (
            embed(model, self.tokenizer, [row[side] for row in self.rows], self.cls)
            for side in (1, 2)
        )
        cosine = (left * right).sum(1)
        return float(spearmanr(cosine, [row[0] for row in self.rows]).statistic)


class News:
    """Recall@1: the share of titles to which no body is nearer than the article's own."""

    def __init__(self, articles: Sequence[tuple[str, str]], tokenizer, cls: bool) -> None:
        self.titles, self.bodies = zip(*articles, strict=True)
        self.tokenizer, self.cls = tokenizer, cls

    def __call__(self, model) -> float:
        """Return it for a model."""
        titles, bodies = (
            embed(model, self.tokenizer, each, self.cls) for each in (self.titles, self.bodies)
        )
        found = (titles @ bodies.T).argmax(1) == torch.arange(len(titles))
        return float(found.double().mean())


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


@torch.no_grad()
def embed(model, tokenizer, texts: Sequence[str], cls: bool) -> Tensor:
    """Return embeddings of length 1: the mean over each text's tokens, or the first of them."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    rows: dict[int, Tensor] = {}
    for at in range(0, len(order), BATCH):
        here = order[at : at + BATCH]
        inputs = encode(tokenizer, [texts[index] for index in here])
        mask = inputs["attention_mask"][..., None]
        states = model(**inputs).last_hidden_state
        pooled = states[:, 0] if cls else (states * mask).sum(1) / mask.sum(1)
        rows |= zip(here, torch.nn.functional.normalize(pooled, dim=-1), strict=True)
    return torch.stack([rows[at] for at in range(len(texts))])


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
        return [], [_parts(article) for article in _held_out(articles, every=1)[1]]
    rest, test = _held_out(articles)
    rest, dev = _held_out(rest)
    return rest, [_parts(article) for article in (test if judge == "test" else dev)]


def _held_out(articles: Sequence[str], every: int = HELD_OUT_EVERY) -> tuple[list[str], list[str]]:
    """Return the articles without every n-th, and those."""
    known: set[str] = set()
    taken = []
    for article in articles[::every]:
        if known.isdisjoint(_parts(article)):
            taken.append(article)
            known |= set(_parts(article))
    return [article for article in articles if known.isdisjoint(_parts(article))], taken


def _parts(article: str) -> tuple[str, str]:
    """Return the first line of an article, and the rest."""
    title, _, body = article.partition("\n")
    return title.strip(), body.strip()


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
