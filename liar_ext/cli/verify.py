"""``liar verify``: prove that a saved model is the one that was saved, wherever it is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from liar_ext.cli.inputs import load_with_tokenizer
from liar_ext.data.texts import evaluation_sequences, read_documents
from liar_ext.errors import InputError
from liar_ext.export.verify import table, verify_everywhere
from liar_ext.models.running import predicts_next_token

SEQ_LEN, SAMPLES = 256, 16


def run(options: argparse.Namespace) -> int:
    """Reload, compare, print; return 1 if outputs differ."""
    ids = _ids(options.folder, options.text) if options.text else None
    facts = verify_everywhere(options.folder, options.device, ids)
    if options.json:
        print(json.dumps({**facts, "rows": [asdict(row) for row in facts["rows"]]}, indent=1))
    else:
        print(f"{facts['params']:,} parameters, {facts['layers']} layers, {facts['dtype']}")
        print("\n".join(table(facts["rows"])))
        if "tokenizer_agrees" in facts:
            verdict = "same tokens" if facts["tokenizer_agrees"] else "OTHER TOKENS"
            print(f"tokenizer: {verdict} for the stored texts")
    return 0 if facts["agrees"] else 1


def _ids(folder: str, text: str) -> Any:
    """Return token ids of a text, as many sequences as a check in every runtime bears."""
    documents = read_documents(text)
    model, tokenizer = load_with_tokenizer(folder, "float32", "cpu")
    if not predicts_next_token(model):
        raise InputError(
            f"verify: --text is for causal language models, got {type(model).__name__}"
        )
    most = getattr(model.config, "max_position_embeddings", SEQ_LEN)
    sequences = evaluation_sequences(
        documents, tokenizer, seq_len=min(SEQ_LEN, most), samples=SAMPLES
    )
    return np.concatenate([batch["input_ids"].numpy() for batch in sequences.batches(1)])
