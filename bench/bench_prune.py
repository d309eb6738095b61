"""What pruning costs beside the forward pass that it cannot do without.

A Llama of SmolLM2-135M's shape, or with ``LIAR_BENCH_SHAPE=qwen`` of Qwen2.5-0.5B's, with random
weights: the cost does not depend on them. Forward is the whole model, head included, over the same
tokens. ``LIAR_BENCH_SEQUENCES`` (8) sequences of 512 tokens; solves, error curves and sensitivities
cost the same for any number of tokens, so few of them overstate their share: 128 is what a user
has. ``stages`` are the report's seconds, by the clock on the wall.
"""

import copy
import os
import time

import pytest
import torch
from common import forward
from conftest import THREADS, reset_peak_memory
from transformers import LlamaConfig, LlamaForCausalLM

from liar_ext import calibrate, prune
from liar_ext.system.environment import process_memory

SEQUENCES = int(os.environ.get("LIAR_BENCH_SEQUENCES", "8"))
SEQ_LEN = 512
SHAPE = os.environ.get("LIAR_BENCH_SHAPE", "smollm2")
SHAPES = {  # layers, hidden size, channels, heads, KV heads, tokens
    "smollm2": (30, 576, 1536, 9, 3, 49152),
    "qwen": (24, 896, 4864, 14, 2, 151936),  # Qwen2.5-0.5B, without its biases
}
CHEAP = {"criterion": "wifv", "allocation": "uniform"}  # no sensitivities, no error curves
JOBS = {
    "prune one-pass": {"schedule": "one-pass", **CHEAP},
    "prune curve": {"criterion": "wifv", "allocation": "curve", "schedule": "one-pass"},
    "prune layerwise": {"schedule": "layerwise", **CHEAP},
    "prune default": {},
}


@pytest.fixture(scope="module")
def job():
    layers, hidden, channels, heads, kv_heads, vocabulary = SHAPES[SHAPE]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, model.config.vocab_size, (SEQUENCES, SEQ_LEN))
    return model, [{"input_ids": rows} for rows in ids.split(4)]


@pytest.fixture(scope="module")
def seconds():
    """Best time of the stages so far."""
    return {}


@pytest.mark.parametrize("stage", ["forward", "calibrate", *JOBS])
def test_prune(benchmark, job, seconds, stage):
    model, batches = job
    calls = {"forward": forward, "calibrate": calibrate}
    calls |= {
        name: lambda model, batches, name=name: prune(model, batches, 0.8, **JOBS[name])
        for name in JOBS
    }
    benchmark._timer = time.process_time if THREADS == 1 else time.perf_counter

    def fresh():
        work = copy.deepcopy(model) if stage in JOBS else model
        reset_peak_memory()
        benchmark.extra_info["memory_before_mib"] = process_memory() >> 20
        return (work, batches), {}

    # What takes minutes is timed once; the memory of calibration is that of one bank.
    rounds = 3 if stage == "forward" and SEQUENCES <= 16 else 1
    done = benchmark.pedantic(
        calls[stage], setup=fresh, rounds=rounds, warmup_rounds=int(rounds > 1)
    )
    if stage in JOBS:
        benchmark.extra_info["stages"] = done.seconds
    seconds[stage] = benchmark.stats.stats.min
    benchmark.extra_info["tokens"] = SEQUENCES * SEQ_LEN
    peak = process_memory(peak=True) >> 20
    benchmark.extra_info["peak_memory_mib"] = peak
    benchmark.extra_info["memory_growth_mib"] = peak - benchmark.extra_info["memory_before_mib"]
    if "forward" in seconds:
        benchmark.extra_info["forwards"] = round(seconds[stage] / seconds["forward"], 2)
