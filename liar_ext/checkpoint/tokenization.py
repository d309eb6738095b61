"""What a saved folder says of a smaller vocabulary, and whether its tokenizer still agrees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from liar_ext.checkpoint.carrying import TOKENIZER
from liar_ext.checkpoint.names import VOCABULARY_FILE
from liar_ext.checkpoint.quietening import quiet
from liar_ext.errors import InputError, one_line
from liar_ext.untrusted import listing, mapping, read_object

# Vocabularies of other tools, which list the tokens of the dense model.
OLDER = (".model", ".spm", ".tiktoken", ".bpe")


def write_vocabulary(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write which tokens were kept, if some were not, and texts with their tokens.

    Raises
    ------
    InputError
        If the tokenizer is not the one that goes with the model.
    """
    facts = getattr(model, "liar_vocabulary", None)
    if facts is None:
        return
    if tokenizer is None or not _agrees(tokenizer, facts["checks"]):
        raise InputError(
            "save_pruned: tokens were removed from the model, and the tokenizer is not the one "
            "without them; pass tokenizer=, which liar_ext.keep_tokens returned"
        )
    (folder / VOCABULARY_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def leave_larger(model: nn.Module, source: Path, folder: Path) -> list[str]:
    """Remove copied files that list tokens of the dense model; return a sentence about them."""
    if getattr(model, "liar_vocabulary", None) is None:
        return []
    for path in folder.iterdir():
        if path.suffix in OLDER:
            path.unlink()
    known = {*TOKENIZER, *(path.name for path in source.iterdir() if path.suffix in OLDER)}
    left = sorted(n for n in known if (source / n).is_file() and not (folder / n).exists())
    lists = [name for name in left if not name.startswith(("special_tokens", "chat_template"))]
    return [
        f"{', '.join(lists)} of the dense model would list removed tokens and stay behind."
    ] * bool(lists)


def compare_tokenization(folder: Path) -> bool | None:
    """Tell whether a folder's tokenizer reads the stored texts as it did; None without any.

    Raises
    ------
    InputError
        If the folder's facts or its tokenizer can't be read.
    """
    if not (folder / VOCABULARY_FILE).is_file():
        return None
    facts = read_object(folder / VOCABULARY_FILE, "verify")[0]
    checks = [mapping(each) for each in listing(facts.get("checks"))]
    if not all(isinstance(each.get("text"), str) for each in checks):
        raise InputError(f"verify: {folder / VOCABULARY_FILE} is damaged; copy the folder again")
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes it raise
        raise InputError(f"verify: the tokenizer can't be loaded: {one_line(error)}") from error
    return _agrees(tokenizer, checks)


def _agrees(tokenizer: Any, checks: list[Mapping[str, Any]]) -> bool:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    return bool(checks) and all(inner.encode(each["text"]) == each.get("ids") for each in checks)
