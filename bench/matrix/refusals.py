"""Cells that cannot be: which, what the refusal must say, and the reason in words."""

from __future__ import annotations

import re

# Regular expressions of a cell's name and of its error; the reason.
REFUSED: tuple[tuple[str, str, str], ...] = (
    (
        r"transformers / .* / unequal",
        r"size mismatch|mismatched|ignore_mismatched_sizes|trust_remote_code",
        "the stock class has one size for all layers and refuses the weights; the folder's code "
        "loads them",
    ),
    (
        r"transformers / BERT-like / hidden",
        r"size mismatch|mismatched|ignore_mismatched_sizes|trust_remote_code",
        "the config of BERT says that heads have hidden size / heads features, which are others "
        "here; the folder's code loads them",
    ),
    (
        r"vLLM / BERT-like / (unequal|hidden)",
        r"exceeds dimension size|Attempted to load weight",
        "vLLM's BERT has one size for all layers and heads of hidden size / heads features, and "
        "the plug-in of liar_ext serves decoders; ONNX Runtime runs this one",
    ),
    (
        r"llama\.cpp / BERT-like / .*",
        r"causal language models of .* can be written",
        "`liar export` writes causal language models as GGUF, and encoders as ONNX",
    ),
    (
        r"ONNX Runtime / (Llama-like|Qwen2) / .*",
        r"takes encoders and classifiers",
        "`liar export` writes encoders and classifiers as ONNX: text generation needs a key-value "
        "cache, which GGUF and vLLM have",
    ),
    (
        r"lm-eval / BERT-like / .*",
        r"needs a causal language model",
        "an encoder predicts no next token, and `liar eval --tasks` says so; lm-eval's own loader "
        "would put a random head onto it",
    ),
)


def expected(name: str) -> tuple[str, str] | None:
    """Return what the error of a cell must match and the reason, if it cannot be."""
    found = (each[1:] for each in REFUSED if re.fullmatch(each[0], name))
    return next(found, None)
