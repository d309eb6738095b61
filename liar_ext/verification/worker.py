"""Loads a folder in a process of its own, compares its output and measures it.

Run as a script it needs transformers and safetensors alone, and makes sure that liar_ext can't be
imported, unless that is the loader to try. A list of jobs comes in as JSON, for each a row goes out
on a line of its own, or what went wrong::

    [{"folder": DIR, "loader": "AutoModelForCausalLM", "code": true,
      "device": "cpu", "fingerprint": FILE, "ids": FILE.npy or null}, ...]
    {"difference": 0.0, "params": 1000, "perplexity": 30.1, "tokens_per_second": 900.0}
    {"error": "RuntimeError: ..."}

Several jobs are done in a process each, forked from one that has imported torch and transformers,
which take longer than a small model, and nothing else. A device must not have been touched then.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

ROUNDS, TOKENS = 5, 128


def main() -> None:
    """Do the jobs on standard input."""
    jobs = json.load(sys.stdin)
    if len(jobs) > 1:
        from transformers import AutoModel  # noqa: F401  (so that no child has to)
    for job in jobs:
        print(json.dumps(apart(job) if len(jobs) > 1 else do(job)), flush=True)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in this process, which is good for no other one then."""
    if job["loader"] != "liar_ext":
        sys.modules["liar_ext"] = None
    return run(job)


def apart(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a child; return its row, or the last line that it said."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                os.write(answer.fileno(), json.dumps(do(job)).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (answer, said):
            file.seek(0)
        if code == 0:
            return json.load(answer)
        lines = said.read().decode(errors="replace").split("\n")
        return {"error": ([line for line in lines if line.strip()] or [f"exit code {code}"])[-1]}


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
