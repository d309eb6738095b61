"""What cells measure: outputs, embeddings and perplexity of a folder, and how far they differ."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
SAME = 1e-4  # of float32 outputs, over the largest of them
NATS = 1e-3  # of a log-probability in another runtime, which sums in another order


def script(path: str) -> ModuleType:
    """Import a script of the repository by its path, whatever package it lies in."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(job: dict, folder: str | Path | None = None) -> Any:
    """Return the model of a folder by transformers, as somebody without liar_ext would."""
    import transformers

    auto = getattr(transformers, job["auto"])
    return auto.from_pretrained(folder or job["folder"], trust_remote_code=job["code"]).eval()


def fingerprint_gap(job: dict, folder: str | Path, code: bool) -> Row:
    """Return how far a folder's outputs are from those of the model that was saved."""
    from safetensors.numpy import load_file

    given = {"folder": str(folder), "loader": job["auto"], "code": code, "device": "cpu"}
    given["fingerprint"] = next(map(str, Path(job["folder"]).glob("liar/fingerprint*")))
    given["ids"] = job["ids"] if job["causal"] else None
    found = script("liar_ext/export/verify_worker.py").do(given)
    largest = float(np.abs(load_file(given["fingerprint"])["output"]).max())
    good = found["difference"] <= SAME * max(1.0, largest)
    number = f"{found['difference']:.0e}"
    if "perplexity" in found:
        number += f", ppl {found['perplexity']:.4g}"
    return {"number": number, "good": good, "largest_output": largest, **found}


def sentences(job: dict, folder: str | Path) -> np.ndarray:
    """Return the embeddings that sentence-transformers computes of the cell's texts."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=job["code"])
    return model.encode(job["texts"], batch_size=4, show_progress_bar=False)


@torch.no_grad()
def pooled(job: dict, model: Any = None) -> np.ndarray:
    """Return pooled hidden states.

    Of decoders the last one, with the text as a chat's message, which is what sentence-transformers
    does if no file says otherwise; of encoders their mean, of length 1 if the folder says so.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    model = model or AutoModel.from_pretrained(job["folder"], trust_remote_code=job["code"])
    rows = []
    for text in job["texts"]:
        options = {}
        if job["causal"]:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False)
            options["add_special_tokens"] = False
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=256, **options)
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        states = model.eval()(**given).last_hidden_state[0].float()
        rows.append(states[-1] if job["causal"] else states.mean(0))
    found = torch.stack(rows)
    if Path(job["folder"], "modules.json").exists():
        found = torch.nn.functional.normalize(found, dim=-1)
    return found.numpy()


def gap(found: np.ndarray, wanted: np.ndarray) -> Row:
    """Return the greatest difference of two arrays of embeddings."""
    if found.shape != wanted.shape:
        return {"number": f"shape {found.shape}", "good": False, "difference": math.inf}
    gap = float(np.abs(found - wanted).max())
    good = gap <= SAME * max(1.0, float(np.abs(wanted).max()))
    return {"number": f"{gap:.0e}", "good": good, "difference": gap}


def quality(job: dict, model: Any) -> Any:
    """Return the perplexity of a decoder on the cell's tokens, or embeddings by an encoder."""
    if not job["causal"]:
        return pooled(job, model=model)
    ids = torch.from_numpy(np.load(job["ids"]))
    with torch.no_grad():
        return script("liar_ext/export/verify_worker.py").perplexity(model, ids)
