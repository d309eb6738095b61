"""What pruning costs beside the forward pass that it cannot do without.

A Llama of SmolLM2-135M's shape with random weights: the cost does not depend on them. Forward is
the whole model, head included, over the same tokens. ``LIAR_BENCH_SEQUENCES`` (8) sequences of 512
tokens; what is solved costs the same for any number of tokens, so few of them overstate its share.
"""

import copy
import os
import time

import pytest
import torch
from conftest import THREADS
from transformers import LlamaConfig, LlamaForCausalLM

from liar_ext import calibrate, prune

SEQUENCES = int(os.environ.get("LIAR_BENCH_SEQUENCES", "8"))
SEQ_LEN = 512


@pytest.fixture(scope="module")
def job():
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (SEQUENCES, SEQ_LEN))
    return model, [{"input_ids": rows} for rows in ids.split(4)]


def forward(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)


@pytest.mark.parametrize("stage", ["forward", "calibrate", "prune"])
def test_prune(benchmark, job, stage):
    model, batches = job
    calls = {
        "forward": forward,
        "calibrate": calibrate,
        "prune": lambda model, batches: prune(model, batches, 0.8),
    }
    benchmark._timer = time.process_time if THREADS == 1 else time.perf_counter

    def fresh():
        return (copy.deepcopy(model) if stage == "prune" else model, batches), {}

    benchmark.pedantic(calls[stage], setup=fresh, rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens"] = SEQUENCES * SEQ_LEN
