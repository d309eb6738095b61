"""The layerwise walk by part, beside the bare forward pass of the same run.

A Llama of a model's shape with random weights, of which few layers run over few sequences of 512
tokens: what grows with the tokens and what doesn't are timed apart, and scaled to all layers and
128 sequences. CPU time of one thread.

    python bench/walk.py qwen --layers 1 --sequences 8
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from liar_ext import ops, prune
from liar_ext.job import solving
from liar_ext.reconstruction import walk

LENGTH, WHOLE = 512, 128
SHAPES = {
    "smollm2": (30, 576, 1536, 9, 3, 49152),
    "qwen": (24, 896, 4864, 14, 2, 151936),  # Qwen2.5-0.5B, without its biases
}


def random_llama(shape: str, layers: int | None = None) -> LlamaForCausalLM:
    """Return a Llama of a model's shape with random weights, of some of its layers or all."""
    depth, hidden, channels, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2, help="layers that run (2)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences that run (16)")
    parser.add_argument("--keep", type=float, default=0.8, help="what stays of each site (0.8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers, model = SHAPES[options.shape][0], random_llama(options.shape, options.layers)
    ids = torch.randint(0, model.config.vocab_size, (options.sequences, LENGTH))
    batches = [{"input_ids": rows, "fold": torch.arange(len(rows)) % 2} for rows in ids.split(4)]
    spent, rows = timed(model, batches, options.keep)

    tokens = WHOLE / options.sequences
    each = tokens * layers / options.layers
    forward = spent["blocks"] * each + spent["head"] * tokens
    parts = {
        "the blocks": (spent["walk"] - spent["sums"] - spent["solves"]) * each,
        "sums": spent["sums"] * each,
        "solves": spent["solves"] * layers / options.layers,
    }
    print(f"forward pass over {WHOLE} x {LENGTH} tokens, scaled: {forward:,.0f} s")
    for name, seconds in {**parts, "the walk": sum(parts.values())}.items():
        print(f"{name}: {seconds:,.0f} s, {seconds / forward:.2f} forward passes")
    for row in rows:
        print(f"{row.name}: {row.path}, damp {row.damp:g}")


def timed(model: LlamaForCausalLM, batches: list, keep: float) -> tuple[Counter, list]:
    """Return the CPU seconds of a forward pass and of a walk by part, and the report's rows."""
    spent: Counter = Counter()

    @contextmanager
    def clock(name: str):
        start = time.process_time()
        yield
        spent[name] += time.process_time() - start

    def clocked(name: str, call: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            with clock(name):
                return call(*args, **kwargs)

        return run

    with torch.no_grad():
        model(**{"input_ids": batches[0]["input_ids"]}, use_cache=False)  # warm
        for batch in batches:
            with clock("blocks"):
                hidden = model.model(input_ids=batch["input_ids"], use_cache=False)[0]
            with clock("head"):
                model.lm_head(hidden)
    gram, whole = ops.gram_update_, solving.reconstruct_layerwise

    def walked(*args: object, **kwargs: object) -> object:
        with mock.patch.object(ops, "gram_update_", clocked("sums", gram)), clock("walk"):
            return whole(*args, **kwargs)

    solve = mock.patch.object(walk, "solve", clocked("solves", walk.solve))
    with solve, mock.patch.object(solving, "reconstruct_layerwise", walked):
        report = prune(model, batches, keep, criterion="wifv", allocation="uniform")
    return spent, report.sites


if __name__ == "__main__":
    main()
