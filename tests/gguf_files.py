"""Folders of tiny models, and what llama.cpp computes with the files that are made of them."""

from __future__ import annotations

import numpy as np
from tiny import outputs, tiny_inputs

from liar_ext import save_pruned
from liar_ext.export.llama_cpp import run_file


def save(model, folder, plan=None, tokenizer=None):
    """Save a model, pruned or not, and return its folder."""
    if plan is None:
        model.save_pretrained(folder)
    else:
        save_pruned(model, folder, plan, tokenizer=tokenizer)
    if plan is None and tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def logits_agree(model, path, tolerance=None, share=1.0):
    """Check logits of a ``share`` of the tokens; rounding sends some to other experts."""
    # llama.cpp reads GELU from a table of float16.
    gelu = model.config.model_type in ("gemma3_text", "gpt2", "gpt_neox")
    tolerance = tolerance or (2e-3 if gelu else 2e-5)
    inputs = tiny_inputs(model, tokens=30)
    found = run_file(path, inputs["input_ids"].numpy(), logits=True)
    ours = outputs(model, inputs).double().numpy()
    worst = np.abs(ours - found["logits"]).max(-1)
    assert np.quantile(worst, share) <= tolerance * max(1, np.abs(ours).max())
