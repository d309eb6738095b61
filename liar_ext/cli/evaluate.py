"""``liar eval``: perplexity of a model on a text."""

from __future__ import annotations

import argparse
import json

from liar_ext.cli.loading import load_with_tokenizer
from liar_ext.errors import InputError
from liar_ext.models.running import predicts_next_token


def run(options: argparse.Namespace) -> None:
    """Print the perplexity."""
    from liar_ext.data import texts
    from liar_ext.evaluation import perplexity

    documents = texts.read_documents(options.text)
    model, tokenizer = load_with_tokenizer(options.model, options.dtype, options.device)
    if not predicts_next_token(model):
        raise InputError(f"eval: MODEL must be a causal language model, got {type(model).__name__}")
    texts.check_seq_len(model, options.seq_len)
    sequences = texts.evaluation_sequences(
        documents, tokenizer, seq_len=options.seq_len, samples=options.samples
    )
    result = perplexity(model, sequences.batches(options.batch_size), progress=not options.quiet)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"perplexity {result['perplexity']:.3f} over {result['tokens']:,} tokens in "
            f"{result['sequences']} windows of {result['seq_len']}"
        )
