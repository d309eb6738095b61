"""Loads a folder in a process of its own, compares its output and measures it.

Run as a script it needs transformers and safetensors alone, and makes sure that liar_ext can't be
imported, unless that is the loader to try. One job comes in as JSON, one row goes out::

    {"folder": DIR, "loader": "AutoModelForCausalLM", "code": true, "alone": true,
     "device": "cpu", "fingerprint": FILE, "ids": FILE.npy or null}
    {"difference": 0.0, "params": 1000, "perplexity": 30.1, "tokens_per_second": 900.0}
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

ROUNDS, TOKENS = 5, 128


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    if job["loader"] != "liar_ext" and job["alone"]:
        sys.modules["liar_ext"] = None
    print(json.dumps(run(job)))


@torch.no_grad()
def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load, compare, measure."""
    with safe_open(job["fingerprint"], framework="pt") as file:
        facts, given, expected = (
            file.metadata(),
            file.get_tensor("input"),
            file.get_tensor("output"),
        )
    settings = {"dtype": getattr(torch, facts["dtype"])}
    model = load(job, settings | {"attn_implementation": facts["attention"]}).eval()
    found = output_of(model, facts["name"], given)
    same = found.shape == expected.shape
    difference = float((found - expected.to(found.dtype)).abs().max()) if same else math.inf
    row = {
        "difference": math.inf if math.isnan(difference) else difference,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_second": tokens_per_second(model, facts["name"], given),
    }
    if job["ids"] is not None:
        row["perplexity"] = perplexity(model, torch.from_numpy(np.load(job["ids"])))
    return row


def load(job: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    """Return the model, by the loader of the job."""
    device = job["device"]
    spread = {"device_map": "auto"} if device == "auto" else {}
    if job["loader"] == "liar_ext":
        from liar_ext.checkpoint import load_pruned

        model = load_pruned(job["folder"], **settings, **spread)
    else:
        import transformers

        loader = getattr(transformers, job["loader"])
        code = {"trust_remote_code": True} if job["code"] else {}
        model = loader.from_pretrained(
            job["folder"], use_safetensors=True, **code, **settings, **spread
        )
    return model if spread else model.to(device)


def output_of(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return logits, or the last hidden state, on the CPU."""
    value = value.to(model.device)
    result = model(**{name: value.to(model.dtype) if value.is_floating_point() else value})
    found = result["logits"] if "logits" in result else result["last_hidden_state"]
    return found.cpu() if found.dtype == torch.float64 else found.float().cpu()


def tokens_per_second(model: nn.Module, name: str, given: Tensor) -> float:
    """Return inputs over the median time of forward passes: a text of 128 tokens, or an image."""
    value = given
    if name == "input_ids":
        most = getattr(model.config, "max_position_embeddings", TOKENS)
        value = given.repeat(1, -(-TOKENS // given.shape[1]))[:, : min(TOKENS, most)]
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        output_of(model, name, value)
        seconds.append(time.perf_counter() - start)
    count = value.shape[1] if name == "input_ids" else value.shape[0]
    return count / statistics.median(seconds[1:])


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return ``exp`` of the mean of ``-log p(token | those before it)`` over sequences."""
    losses = []
    for row in ids.long():
        logits = model(input_ids=row[None].to(model.device)).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, row[1:].to(logits.device)).item())
    return math.exp(statistics.fmean(losses))


if __name__ == "__main__":
    main()
