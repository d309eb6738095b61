"""A tiny model, its recipe and its data, for the checks of llm-compressor."""

from __future__ import annotations

import torch
from tiny import VOCAB
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
W4 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
    "ignore": ["lm_head"],
}
EQUAL = {"keep": 0.7, "tile": 32, "uniform_layers": True}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def rows(count=16, tokens=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 1, (count, tokens), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def loader(some=None, batch=4):
    return DataLoader(some or rows(), batch_size=batch)


def padded(row, width, side):
    gap = width - len(row["input_ids"])
    at = (gap, 0) if side == "left" else (0, gap)
    pad = torch.nn.functional.pad
    return {name: pad(value, at) if value.dim() else value for name, value in row.items()}


def run(folder, *modifiers, **settings):
    from llmcompressor import oneshot

    settings.setdefault("dataset", loader())
    return oneshot(model=load(folder), recipe=list(modifiers), **settings)


def logits(model):
    ids = torch.stack([row["input_ids"] for row in rows(3, seed=9)])
    with torch.no_grad():
        return model(input_ids=ids).logits
