"""``liar eval`` of an encoder: what it keeps of the dense model's outputs, and pairs of texts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from liar_ext.cli.inputs import load_with_tokenizer
from liar_ext.data import texts
from liar_ext.data.pairs import Pairs, read_pairs
from liar_ext.embeddings import embed, encoder_similarity, pair_quality
from liar_ext.errors import InputError
from liar_ext.models.inputs import inputs_read
from liar_ext.report.report import Report
from liar_ext.report.tables import MEASURES, measured_on, quality

PAIR_MEASURES = {"spearman": "Spearman correlation", "recall_at_1": "recall@1"}


def read_texts(options: argparse.Namespace) -> tuple[Sequence[str] | None, Pairs | None]:
    """Return what the options name, before a model is loaded."""
    documents = texts.read_documents(options.text) if options.text else None
    return documents, read_pairs(options.pairs) if options.pairs else None


def judge(
    options: argparse.Namespace,
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[str] | None,
    pairs: Pairs | None,
) -> tuple[dict[str, Any], str]:
    """Return what was measured of an encoder, and the lines that say it.

    Raises
    ------
    InputError
        If the dense model is not known, or nothing can be measured.
    """
    if "input_ids" not in inputs_read(model):
        raise InputError(
            f"eval: {type(model).__name__} reads {' and '.join(inputs_read(model))}, and no text; "
            "call liar_ext.encoder_similarity with batches of your own"
        )
    against = options.against or _known(options.model, needed=documents is not None)
    dense = load_with_tokenizer(against, options.dtype, options.device)[0] if against else None
    result: dict[str, Any] = {"against": against} if against else {}
    lines = []
    if documents is not None:
        sequences = texts.evaluation_sequences(
            documents,
            tokenizer,
            seq_len=options.seq_len,
            samples=options.samples,
            packed=False,
        )
        batches = sequences.batches(options.batch_size)
        found = encoder_similarity(model, dense, batches, progress=options.progress)
        result |= found
        lines += [
            f"{MEASURES[name]} {quality(found[name])} over {measured_on(found)}"
            for name in MEASURES
            if name in found
        ]
    if pairs is not None:
        result |= _of_pairs(model, tokenizer, pairs, options)
        own = {} if dense is None else _of_pairs(dense, tokenizer, pairs, options)
        for name in PAIR_MEASURES.keys() & own.keys():
            result[f"dense_{name}"] = own[name]
        for name in PAIR_MEASURES.keys() & result.keys():
            beside = f" (dense {own[name]:.4f})" if own else ""
            said = f"{PAIR_MEASURES[name]} {result[name]:.4f}{beside}"
            lines.append(f"{said} over {result['pairs']:,} pairs")
    return result, "\n".join(lines)


def _known(folder: str, *, needed: bool) -> str | None:
    """Return the dense model that a folder was pruned from, if it is still there.

    Raises
    ------
    InputError
        If it is needed, and not known or gone.
    """
    try:
        report = Report.load(folder)
        name = str(report.choices.get("model") or report.model)
    except InputError:
        name = ""
    if name and Path(name).is_dir():
        return name
    if needed:
        gone = f"the folder of its report, {name}, is not there" if name else "it has no report"
        raise InputError(
            f"eval: {folder} is an encoder, which is compared with the dense model, and {gone}; "
            "give it by --against DENSE"
        )
    return None


def _of_pairs(
    model: nn.Module, tokenizer: Any, pairs: Pairs, options: argparse.Namespace
) -> dict[str, float]:
    """Return what :func:`liar_ext.embeddings.pair_quality` finds of a model."""

    def embeddings(of: Sequence[str]) -> Tensor:
        settings = {"seq_len": options.seq_len, "packed": False}
        sequences = texts.evaluation_sequences(of, tokenizer, **settings)
        order = sequences.attention_mask.sum(1).argsort(stable=True)  # as batches are made
        found = embed(model, sequences.batches(options.batch_size), progress=options.progress)
        return found[order.argsort()]

    return pair_quality(
        embeddings(pairs.first), embeddings(pairs.second), pairs.second, pairs.scores
    )
