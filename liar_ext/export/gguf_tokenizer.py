"""Write a tokenizer into a GGUF file, as one of the two kinds of BPE that llama.cpp has.

The one on bytes (GPT-2, Llama 3, Qwen) needs the name of the rule that splits text into words. That
of SentencePiece (Llama 2, Gemma) joins the two neighbours whose token has the highest score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from liar_ext.system.errors import InputError, refusing

WORDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
)
WHOLE = ("ByteLevel", False)  # splits no further
THREE = ("Split", f"{SHORT}\\p{{N}}{{1,3}}{SIGNS}{WORDS}")
ONE = ("Split", f"{SHORT}\\p{{N}}{SIGNS}{WORDS}")
# Steps of the rule, and whether a word that is a token stays whole (ignore_merges): the name.
RULES: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((THREE, WHOLE), True): "llama-bpe",
    ((THREE, WHOLE), False): "smaug-bpe",
    ((ONE, WHOLE), False): "qwen2",
    ((("Split", f"{TEKKEN}{WORDS}"), WHOLE), True): "tekken",
}
DETAILS = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
MARKS = ("continuing_subword_prefix", "end_of_word_suffix")  # of tokens, as in CLIP
NEVER = -1e6  # score of a token that no merge makes


def add_tokenizer(writer: Any, tokenizer: Any, model: nn.Module) -> list[str]:
    """Write the tokenizer of a model, and its chat template; return what the user should know."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return ["The folder has no tokenizer, so the file takes token ids, and no text."]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"a slow one, {type(tokenizer).__name__}")
    fields = json.loads(backend.to_str())
    if fields["model"].get("type") != "BPE":
        raise _refusal(f"{fields['model'].get('type')}, not BPE")
    if any(fields["model"].get(mark) for mark in MARKS):
        raise _refusal("whose tokens show where a word begins or ends")
    tokens, types, notes = _tokens(tokenizer, fields, rows)
    joins_by_score = bool(fields["model"].get("byte_fallback"))
    rule, more = ("default", []) if joins_by_score else _rule(fields)
    writer.add_tokenizer_model("llama" if joins_by_score else "gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    merges = fields["model"]["merges"]
    pairs = [each.split(" ") if isinstance(each, str) else each for each in merges]
    if joins_by_score:
        ranks: dict[str, int] = {}  # merges are sorted by the scores of their tokens
        for rank, (first, second) in enumerate(pairs):
            ranks.setdefault(first + second, rank)
        writer.add_token_scores([-float(ranks[t]) if t in ranks else NEVER for t in tokens])
    else:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_add_space_prefix(joins_by_score and _prepends_space(fields))
    writer.add_token_types(types)
    _add_special(writer, tokenizer, rows)
    return notes + more


def _tokens(
    tokenizer: Any, fields: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int], list[str]]:
    """Return the token and the type of each row of the embeddings, and notes."""
    import gguf

    kind = gguf.TokenType
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [int(kind.UNUSED)] * rows
    fallback = fields["model"].get("byte_fallback")
    dropped = []
    for token, index in tokenizer.get_vocab().items():
        if index >= rows:
            dropped.append(token)
            continue
        is_byte = fallback and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
        tokens[index] = token
        types[index] = int(kind.BYTE if is_byte else kind.NORMAL)
    for added in fields["added_tokens"]:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = int(kind.CONTROL if added["special"] else kind.USER_DEFINED)
    unknown = fields["model"].get("unk_token")
    if fallback and unknown in tokens:
        types[tokens.index(unknown)] = int(kind.UNKNOWN)
    if not dropped:
        return tokens, types, []
    names = ", ".join(sorted(dropped)[:4])
    return tokens, types, [f"Tokens without a row of the embeddings are left out: {names}."]


def _prepends_space(fields: Mapping[str, Any]) -> bool:
    """Return whether text gets a space in front; refuse what isn't SentencePiece's way."""
    prepends = False
    before = _steps(fields["normalizer"], "normalizers")
    for step in before + _steps(fields["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prepends = True
        elif kind == "Metaspace" and step["replacement"] == SPACE:
            prepends = prepends or step["prepend_scheme"] != "never"
        elif kind == "Replace":
            if (step["pattern"].get("String"), step["content"]) != (" ", SPACE):
                raise _refusal(f"with a replacement of {str(step['pattern'])[:60]}")
        elif not (kind == "Split" and step["pattern"].get("String") == " "):
            raise _refusal(f"with the step {kind}")
    return prepends


def _rule(fields: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the name that llama.cpp has for how a tokenizer splits text, and notes."""
    notes = []
    for step in _steps(fields["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise _refusal(f"with the normalisation {step['type']}")
        notes.append("llama.cpp doesn't normalise text (NFC) as the tokenizer does.")
    parts: list[tuple[str, Any]] = []
    for step in _steps(fields["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        detail = step[DETAILS[kind]] if kind in DETAILS else None
        parts.append((kind, detail.get("Regex") if kind == "Split" else detail))
        if step.get("add_prefix_space") or step.get("invert"):
            raise _refusal("that adds a space in front, or splits by what it keeps")
        if step.get("behavior", "Isolated") != "Isolated":
            raise _refusal(f"that splits text in the way {step['behavior']}")
    rule = tuple(parts), bool(fields["model"].get("ignore_merges"))
    if rule not in RULES:
        raise _refusal(f"that splits text by {str(parts)[:120]}")
    return RULES[rule], notes


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normaliser or a rule that splits, one after the other."""
    if step is None:
        return []
    return [*step[inner]] if step["type"] == "Sequence" else [step]


def _add_special(writer: Any, tokenizer: Any, rows: int) -> None:
    """Write the special tokens, which of them text gets, and the chat template."""
    ids = {
        name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")
    }
    for name, index in ids.items():
        if isinstance(index, int) and index < rows:
            getattr(writer, f"add_{name}_token_id")(index)
    what = "export: --to gguf: the tokenizer can't read text"
    with refusing(what, "copy the folder again", TypeError, ValueError):
        text = tokenizer("a").input_ids
    writer.add_add_bos_token(ids["bos"] is not None and text[:1] == [ids["bos"]])
    writer.add_add_eos_token(ids["eos"] is not None and text[-1:] == [ids["eos"]])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": each} for name, each in template.items()]
    if template:
        writer.add_chat_template(template)


def _refusal(what: str) -> InputError:
    return InputError(
        f"export: --to gguf: llama.cpp has no tokenizer {what}; use a copy of the folder without "
        "its tokenizer files for a file that takes token ids"
    )
