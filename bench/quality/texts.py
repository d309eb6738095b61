"""Texts to calibrate on and to judge by, from packages, or of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bench import assets
from bench.quality.windows import HeldOut
from liar_ext import InputError
from liar_ext.calibration.batches import Sequences
from liar_ext.calibration.documents import (
    Documents,
    check_apart,
    document_digests,
    read_documents,
)
from liar_ext.calibration.generated import (
    SELF,
    count_beside,
    document_prefix,
    enough_documents,
    fraction_of,
    seed_of,
    write_documents,
    write_sequences,
)
from liar_ext.calibration.texts import calibration_sequences, evaluation_sequences

PROMPT_TOKENS = 32
# Of 50 articles of an encyclopaedia seven are held out, of 2,225 news articles every eighth.
HELD_OUT_EVERY = 8
CALIBRATION_KINDS = ("encyclopaedia", "news")
# WikiText-2 as it is passed around: the raw test text, and a validation text to calibrate on.
WIKITEXT = ("wikitext-2", "wiki.test.raw", ("wiki.valid.raw", "valid-unk.txt"))


def write_texts(folder: Path) -> None:
    """Write the texts of packages, as JSON lines: two kinds to calibrate on, four to judge by."""
    articles = assets.collected_documents("wikipedia")
    news, held_out_news = assets.hold_out(assets.news_documents(), HELD_OUT_EVERY)
    texts = {
        "encyclopaedia": [text for i, text in enumerate(articles) if i % HELD_OUT_EVERY],
        "held_out_encyclopaedia": articles[::HELD_OUT_EVERY],
        "held_out_web": assets.collected_documents("openwebtext"),
        "news": news,
        "held_out_news": held_out_news,
        "held_out_code": assets.collected_documents("codeparrot/github-code"),
    }
    assets.write_documents(folder, texts)


def choose_texts(
    folder: Path, calibration: Sequence[str], judged: Sequence[str], wikitext: Path | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return names and sources of the texts to calibrate on, and of those to judge by.

    :func:`write_texts` wrote to ``folder``. One calibrates on :data:`CALIBRATION_KINDS`, ``self``
    or other sources, and judges by ``NAME=SOURCE``, or else by the four kinds. ``wikitext`` is a
    folder of WikiText-2, which then is the encyclopaedia. InputError if one is not of that form.
    """
    held_out = {
        kind: str(folder / f"held_out_{kind}.jsonl")
        for kind in ("encyclopaedia", "web", "news", "code")
    }
    sources = {kind: str(folder / f"{kind}.jsonl") for kind in CALIBRATION_KINDS}
    if wikitext is not None:
        name, test, validation = WIKITEXT
        found = [wikitext / each for each in validation if (wikitext / each).is_file()]
        if not found or not (wikitext / test).is_file():
            raise InputError(f"quality: {wikitext} must hold {test} and {' or '.join(validation)}")
        sources["encyclopaedia"] = str(found[0])
        held_out = {name: str(wikitext / test)} | held_out
        del held_out["encyclopaedia"]
    if judged:
        held_out = dict(each.partition("=")[::2] for each in judged)
        if not all(held_out) or not all(held_out.values()) or len(held_out) < len(judged):
            raise InputError(
                f"quality: texts to judge by are NAME=SOURCE, each name once, got {list(judged)}"
            )
    chosen = {}
    for each in calibration:
        source = sources.get(each, each)
        chosen[Path(source).stem] = source
    return chosen, held_out


class Texts:
    """All texts of a run, read once; InputError if a document is calibrated on and judged by."""

    def __init__(self, calibration: dict[str, str], judged: dict[str, str]) -> None:
        self.calibration = {
            name: [] if source == SELF else read_documents(source)
            for name, source in calibration.items()
        }
        self.judged = {name: read_documents(source) for name, source in judged.items()}
        # What a model has written, by the model and what it was asked for.
        self._written: WeakKeyDictionary[nn.Module, dict[tuple, Documents | Sequences]]
        self._written = WeakKeyDictionary()
        known = document_digests(text for some in self.calibration.values() for text in some)
        for documents in self.judged.values():
            check_apart(known, documents)

    def draw(
        self,
        model,
        tokenizer,
        *,
        samples: int,
        seq_len: int,
        seed: int,
        lone: str,
        self_text: float,
        random_tokens: float | str,
        judge: int = 0,
    ) -> Sequences:
        """Return the calibration set of a seed; what the model writes itself is written here."""
        sources, written = dict(self.calibration), self._written.setdefault(model, {})
        if SELF in sources:
            share = enough_documents(-(-(samples + judge) // len(sources)))
            key = seed, share, seq_len
            if key not in written:
                written[key] = write_documents(
                    model, tokenizer, documents=share, tokens=seq_len, seed=seed
                )
            sources[SELF] = written[key]
        drawn = calibration_sequences(
            list(sources.values()),
            tokenizer,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            judge=judge,
            lone=lone,
            random_tokens=fraction_of(random_tokens, True, self_text > 0 or SELF in sources),
        )
        if self_text == 0 or SELF in sources:
            return drawn
        rows = drawn.input_ids[drawn.source >= 0]
        count, seed = count_beside(len(rows), self_text), seed_of(rows, seed)
        own = count, seed, seq_len
        if own not in written:
            how = {"count": count, "seq_len": seq_len, "seed": seed}
            written[own] = write_sequences(model, tokenizer, **how)
        return drawn.beside(written[own])

    def windows(self, tokenizer, *, seq_len: int, samples: int) -> dict[str, HeldOut]:
        """Return windows of each text to judge by, evenly spread."""
        found = {}
        for name, documents in self.judged.items():
            ids = evaluation_sequences(documents, tokenizer, seq_len=seq_len, samples=samples)
            found[name] = HeldOut(
                list(ids.input_ids),
                [tokenizer.decode(row[1:], skip_special_tokens=True) for row in ids.input_ids],
            )
        return found

    def prompts(self, tokenizer, count: int) -> Tensor:
        """Return the first tokens of windows of each text to judge by, as many of each."""
        each = count // len(self.judged)
        length = PROMPT_TOKENS + len(document_prefix(tokenizer))
        return torch.cat(
            [
                evaluation_sequences(text, tokenizer, seq_len=length, samples=each).input_ids
                for text in self.judged.values()
            ]
        )


def digest_of(*parts: Any) -> str:
    """Return a digest of tensors and of what JSON can say."""
    digest = blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            plain = part.detach().reshape(-1).contiguous().cpu()
            digest.update(plain.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()
