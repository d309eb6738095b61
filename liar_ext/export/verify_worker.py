"""Loads a folder, compares its output with the one that was saved, and measures it.

As a script it makes sure that liar_ext can't be imported, unless that is the loader to try. A list
of jobs comes in as JSON, for each a row goes out on a line of its own, or what went wrong::

    [{"folder": DIR, "loader": "AutoModelForCausalLM", "code": true,
      "device": "cpu", "fingerprint": FILE, "ids": FILE.npy or null}, ...]
    {"difference": 0.0, "params": 1000, "perplexity": 30.1, "tokens_per_second": 900.0}
    {"error": "RuntimeError: ..."}
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

ROUNDS, TOKENS = 5, 128


def main() -> None:
    """Do the jobs on standard input; several have a process each, forked of this one."""
    jobs = json.load(sys.stdin)
    if len(jobs) > 1:
        from transformers import AutoModel  # noqa: F401  (so that no child has to)
    for job in jobs:
        if len(jobs) > 1:
            do_apart(job)
        else:
            print(json.dumps(do(job)), flush=True)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in this process, which is good for no other one then."""
    if job["loader"] != "liar_ext":
        sys.modules["liar_ext"] = None
    model = load(job)
    row = compare(model, job)
    row["tokens_per_second"] = tokens_per_second(model, _saved(job)[1])
    if job["ids"] is not None:
        row["perplexity"] = perplexity(model, torch.from_numpy(np.load(job["ids"])))
    return row


def do_apart(job: dict[str, Any]) -> None:
    """Do a job in a child, which prints its row, or what went wrong."""
    child = os.fork()
    if child == 0:
        try:
            with redirect_stdout(sys.stderr):
                answer = do(job)
        except BaseException as error:
            answer = {"error": traceback.format_exception_only(error)[-1]}
        print(json.dumps(answer), flush=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        print(json.dumps({"error": f"exit code {code}"}), flush=True)


def load(job: dict[str, Any]) -> nn.Module:
    """Return the model, by the loader of the job, as it was when it was saved."""
    facts, device = _saved(job)[0], job["device"]
    settings: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    settings |= {"dtype": getattr(torch, facts["dtype"]), "attn_implementation": facts["attention"]}
    if job["loader"] == "liar_ext":
        from liar_ext.checkpoint import load_pruned

        model = load_pruned(job["folder"], **settings)
    else:
        import transformers

        settings |= {"trust_remote_code": True} if job["code"] else {}
        settings["use_kernels"] = False  # transformers 5.25 takes kernels of the hub by default
        loader = getattr(transformers, job["loader"])
        model = loader.from_pretrained(job["folder"], use_safetensors=True, **settings)
    return (model if device == "auto" else model.to(device)).eval()


def compare(model: nn.Module, job: dict[str, Any]) -> dict[str, Any]:
    """Return the greatest difference of outputs from those that were saved, and the parameters."""
    _, inputs, expected = _saved(job)
    known = [getattr(model.config.get_text_config(), "vocab_size", 0)]
    with suppress(NotImplementedError, AttributeError):  # of towers there is no one table
        known.append(model.get_input_embeddings().weight.shape[0])
    for name, value in inputs.items():  # on a GPU others end all work of the process
        if name.endswith("_ids") and not 0 <= int(value.min()) <= int(value.max()) < max(known):
            raise ValueError(f"it has tokens beyond the {max(known)} that the model knows")
    found = output_of(model, inputs)
    same = found.shape == expected.shape
    difference = float((found - expected.to(found.dtype)).abs().max()) if same else math.inf
    return {
        "difference": math.inf if math.isnan(difference) else difference,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def _saved(job: dict[str, Any]) -> tuple[dict[str, str], dict[str, Tensor], Tensor]:
    """Return facts, inputs and output of the fingerprint, see ``checkpoint/folder.py``."""
    with safe_open(job["fingerprint"], framework="pt") as file:
        facts = file.metadata()
        more = [key for key in file.keys() if key.startswith("input:")]  # noqa: SIM118, no mapping
        inputs = {facts["name"]: file.get_tensor("input")}
        inputs |= {key.removeprefix("input:"): file.get_tensor(key) for key in more}
        return facts, inputs, file.get_tensor("output")


@torch.no_grad()
def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a model puts out, as :func:`liar_ext.models.running.output_of`, on the CPU."""
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    result = model(**given)
    if result.get("start_logits") is not None:
        found = torch.stack([result["start_logits"], result["end_logits"]], 1)
    else:
        names = [name for name in ("logits", "last_hidden_state") if result.get(name) is not None]
        names = names[:1] or [name for name in ("image_embeds", "text_embeds") if name in result]
        found = torch.cat([result[name] for name in names])
    return found.cpu() if found.dtype == torch.float64 else found.float().cpu()


def tokens_per_second(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Return inputs over the median time of forward passes: a text, see below, or an image."""
    name, value = next(iter(inputs.items()))
    if name == "input_ids" and len(inputs) == 1:
        most = getattr(model.config, "max_position_embeddings", None)
        value = torch.from_numpy(timed_text(value.numpy(), most))
        inputs = {name: value}
    return value.shape[name == "input_ids"] / median_seconds(lambda: output_of(model, inputs))


def timed_text(ids: np.ndarray, most: int | None) -> np.ndarray:
    """Return a text of 128 tokens, or the one given if the model may not have the positions."""
    # Of its ``most``, the first ones can be padding's, as in RoBERTa.
    return ids if most is not None and most < 2 * TOKENS else np.resize(ids, (1, TOKENS))


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the median time of some runs, of which the first doesn't count."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return ``exp`` of the mean of ``-log p(token | those before it)`` over sequences."""
    losses = []
    for row in ids.long():
        logits = model(input_ids=row[None].to(model.device)).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, row[1:].to(logits.device)).item())
    return math.exp(statistics.fmean(losses))


if __name__ == "__main__":
    main()
