"""Cells of llm-compressor: a folder quantised, saved and loaded again, without liar_ext."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from measures import Row, load, quality

COSINE = 0.99  # of sentence embeddings, eight bits beside float32
GROUPS = (32, 16)  # inputs that share a scale in W4A16: the first that divides all sizes


def w4a16(job: dict) -> Row:
    """Quantise weights to four bits in groups, by rounding to nearest."""
    linear = [each for each in load(job).modules() if isinstance(each, torch.nn.Linear)]
    group = next(g for g in GROUPS if all(each.in_features % g == 0 for each in linear))
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group}
    scheme = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    return {**_quantised(job, scheme), "group": group}


def w8a8(job: dict) -> Row:
    """Quantise weights by channel and activations by token to eight bits."""
    return _quantised(job, {"targets": ["Linear"], "scheme": "W8A8"})


def _quantised(job: dict, scheme: dict) -> Row:
    """Return the perplexity, or the similarity of embeddings, of a folder that was quantised."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(job)
    out, before = Path(job["room"], "quantised"), quality(job, model)
    ignore = ["lm_head"] if job["causal"] else []
    oneshot(
        model=model,
        recipe=[QuantizationModifier(**scheme, ignore=ignore)],
        output_dir=str(out),
    )
    fields = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert fields["quantization_config"]["quant_method"] == "compressed-tensors"
    again = load(job, out)
    quantised = sum(hasattr(each, "quantization_scheme") for each in again.modules())
    assert quantised, "no layer of what was loaded is quantised"
    after = quality(job, again)
    sizes = [sum(f.stat().st_size for f in Path(d).glob("*.safetensors")) / 1e6
             for d in (job["folder"], out)]  # fmt: skip
    if job["causal"]:
        number, good = f"ppl {before:.4g} → {after:.4g}", math.isfinite(after)
        good = good and after <= 3 * before
    else:
        similar = (before * after).sum(-1) / np.linalg.norm(before, axis=-1)
        similar = float((similar / np.linalg.norm(after, axis=-1)).min())
        number, before, after = f"cosine ≥ {similar:.4f}", 1.0, similar
        good = similar >= (COSINE if "scheme" in scheme else 0.9)
    return {"number": number, "good": good, "before": before, "after": after,
            "megabytes": sizes, "layers_quantised": quantised}  # fmt: skip
