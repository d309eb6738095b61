"""Cells of what loads a folder, trains it or runs tasks on it, without liar_ext."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import SAME, Row, fingerprint_gap, gap, load, pooled, sentences


def plain(job: dict) -> Row:
    """Load by a stock class, which knows nothing of pruning."""
    return fingerprint_gap(job, job["folder"], code=False)


def with_code(job: dict) -> Row:
    """Load by the code in the folder."""
    return fingerprint_gap(job, job["folder"], code=True)


def second_save(job: dict) -> Row:
    """Load, save, load and save once more: the third folder computes the same."""
    import transformers

    folder = job["folder"]
    for again in ("second", "third"):
        model = load(job, folder)
        folder = Path(job["room"], again)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(job["folder"]).save_pretrained(folder)
    return fingerprint_gap(job, folder, code=job["code"])


def sentence_transformers(job: dict) -> Row:
    """Compare embeddings with pooling by hand, before and after SentenceTransformer.save."""
    from sentence_transformers import SentenceTransformer

    again = Path(job["room"], "saved-by-st")
    found = sentences(job, job["folder"])
    encoder = SentenceTransformer(job["folder"], device="cpu", trust_remote_code=job["code"])
    encoder.save(str(again))
    wanted = pooled(job)
    rows = [gap(each, wanted) for each in (found, sentences(job, again))]
    return max(rows, key=lambda row: (not row["good"], row["difference"]))


def lm_eval(job: dict) -> Row:
    """Run a local task by lm-eval's own loader; the dense model's accuracy stands beside.

    That loader puts a random head onto an encoder; `liar eval` is what refuses one.
    """
    if not job["causal"]:
        options = ["--tasks", "continuations", "--include-path", job["tasks"], "--quiet"]
        command = [sys.executable, "-m", "liar_ext", "eval", job["folder"], *options]
        done = subprocess.run(command, capture_output=True, text=True)
        raise RuntimeError(f"{done.returncode}: {done.stderr}")
    import lm_eval as harness
    from lm_eval.tasks import TaskManager

    found = []
    for folder in (job["dense"], job["folder"]):
        settings = {"pretrained": folder, "dtype": "float32", "device": "cpu"}
        settings["trust_remote_code"] = job["code"] and folder == job["folder"]
        result = harness.simple_evaluate(
            "hf", model_args=settings, tasks=["continuations"], batch_size=4,
            task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
        )  # fmt: skip
        found.append(result["results"]["continuations"]["acc,none"])
    items = result["n-samples"]["continuations"]["effective"]
    number = f"{found[1]:.2f} (dense {found[0]:.2f})"
    return {"number": number, "good": all(map(math.isfinite, found)), "items": items,
            "accuracy": found[1], "accuracy_dense": found[0]}  # fmt: skip


def peft(job: dict) -> Row:
    """Train an adapter for a step, merge it, save, load: the same outputs."""
    from peft import LoraConfig, get_peft_model

    model, ids = load(job), torch.from_numpy(np.load(job["ids"])).long()[:1, :64]

    def output(some: Any) -> torch.Tensor:
        with torch.no_grad():
            return some.eval()(input_ids=ids)[0].float()

    before = output(model)
    targets = ["q_proj", "v_proj", "down_proj"] if job["causal"] else ["query", "value"]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first step moves but one of the two factors, which begins at zero
        loss = tuned.train()(input_ids=ids)[0].float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained = output(tuned)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(Path(job["room"], "merged"))
    found = float((output(load(job, Path(job["room"], "merged"))) - trained).abs().max())
    moved = float((trained - before).abs().max())
    good = found <= SAME * max(1.0, float(trained.abs().max())) and moved > 10 * found
    return {"number": f"{found:.0e}", "good": good, "difference": found, "moved_by_training": moved}
