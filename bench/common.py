"""What benches share: options, texts, seconds, rows that are kept, tables, and a random text.

It imports no neighbour, so that scripts take it as ``common`` and modules as ``bench.common``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liar_ext.calibration.batches import FACTS, Sequences
from liar_ext.calibration.documents import read_documents
from liar_ext.calibration.texts import calibration_sequences, evaluation_sequences
from liar_ext.models.running import evaluating
from liar_ext.system.files import atomic_write


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the text of a script."""
    how = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=how)


def text_parser(doc: str | None, samples: int, seq_len: int) -> argparse.ArgumentParser:
    """Return a parser with a model, and how much of which text it is calibrated on."""
    parser = parser_of(doc)
    add = parser.add_argument
    add("model", help="model folder, hub id or GGUF file")
    add("--calibration", nargs="+", required=True, help="texts")
    add("--samples", type=int, default=samples, help="calibration sequences")
    add("--seq-len", type=int, default=seq_len, help="tokens of a sequence")
    return parser


def calibrated_on(options: argparse.Namespace, tokenizer: Any, **choices: Any) -> Sequences:
    """Return the calibration sequences that the options of :func:`text_parser` ask for."""
    sources = [read_documents(source) for source in options.calibration]
    choices = {"samples": options.samples, "seq_len": options.seq_len, **choices}
    return calibration_sequences(sources, tokenizer, **choices)


def windows_of(source: str, tokenizer: Any, seq_len: int, samples: int | None) -> Sequences:
    """Return windows of a held-out text, evenly spread."""
    return evaluation_sequences(read_documents(source), tokenizer, seq_len=seq_len, samples=samples)


def cpu_seconds(call: Callable[[], object], rounds: int = 1) -> float:
    """Return the CPU seconds of a call, the least of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


@torch.no_grad()
def forward(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Run a model over batches, without a cache."""
    with evaluating(model):
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name not in FACTS})


def keep_layers(model: nn.Module, count: int | None) -> None:
    """Remove all blocks of a model after the first ones; None leaves it as it is."""
    blocks = next(each for each in model.modules() if isinstance(each, nn.ModuleList))
    del blocks[count or len(blocks) :]
    model.config.num_hidden_layers = len(blocks)


def read_rows(path: Path) -> list:
    """Return the rows that a run before has kept, if there was one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_json(path: Path, value: object) -> None:
    """Write a value that JSON can say, as :func:`write_whole` does."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that there is the old one or the new one, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of Markdown, without a line end."""
    lines = [columns, *(map(str, row) for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def placed(page: str, text: str, begin: str, end: str) -> str:
    """Return a page with a text between its two marks."""
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"{begin} and {end} must be there once")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def write_random_text(path: Path, lines: int, tokenizer: Path) -> None:
    """Write lines of random words, and to a folder a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = random.Random(0)
    text = (" ".join(f"w{words.randrange(999)}" for _ in range(99)) for _ in range(lines))
    path.write_text("\n".join(text), encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: at for at, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tokenizer)
