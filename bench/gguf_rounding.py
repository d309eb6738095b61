"""Where the log-likelihoods of a q8_0 GGUF file come apart from those of its folder.

llama.cpp multiplies weights of 8 bits with inputs that it rounds to 8 bits as well, a scale for 32
neighbours each. This runs a folder that ``make check-gguf`` has made as f16 and as q8_0 by
llama.cpp, the weights of q8_0 by transformers, and those once more with inputs rounded in the same
way, and prints how far each is from float32: mean, 99th percentile, the greatest, and how many
tokens differ by more than half a nat. Then the largest inputs of linear layers.

    python bench/gguf_rounding.py build/check-gguf/equal --eval TEXT
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from check_gguf import likelihoods
from common import windows_of

from liar_ext.checkpoint import load_model
from liar_ext.export import export
from liar_ext.export.llama_cpp import run_file

HEAD = (
    "| weights | inputs | run by | mean | 99 % | greatest | over 0.5 |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table and the largest inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--eval", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.folder)
    ids = windows_of(options.eval, tokenizer, 512, 4).input_ids.numpy()
    wanted = likelihoods(model, ids)
    del model
    print(f"{options.folder.name}, {wanted.size} tokens\n{HEAD}")
    with tempfile.TemporaryDirectory() as room:
        paths = {kind: Path(room, f"{kind}.gguf") for kind in ("f16", "q8_0")}
        for kind, path in paths.items():
            export(options.folder, "gguf", path, progress=False, check=False, quantize=kind)
            inputs = "8 bits" if kind == "q8_0" else kind
            show(kind, inputs, "llama.cpp", run_file(path, ids)["nll"] - wanted)
        quantised, _ = load_model(paths["q8_0"])
    show("q8_0", "float32", "transformers", likelihoods(quantised, ids) - wanted)
    largest: dict[str, float] = {}
    for name, module in quantised.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(round_inputs, name=name, largest=largest))
    show("q8_0", "8 bits", "transformers", likelihoods(quantised, ids) - wanted)
    top = sorted(largest, key=largest.get, reverse=True)[:3]
    print("largest inputs:", ", ".join(f"{name} {largest[name]:.0f}" for name in top), end="; ")
    print(f"median of {len(largest)} layers {statistics.median(largest.values()):.1f}")


def round_inputs(module, args: tuple, *, name: str, largest: dict[str, float]) -> tuple:
    """Round the input of a linear layer as q8_0 does: a forward pre-hook."""
    (inputs,) = args
    largest[name] = max(largest.get(name, 0.0), float(inputs.abs().max()))
    blocks = inputs.unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    rounded = (blocks / scale.clamp_min(1e-12)).round().clamp(-127, 127) * scale
    return (rounded.flatten(-2),)


def show(weights: str, inputs: str, runtime: str, difference: np.ndarray) -> None:
    """Print a row."""
    size = np.abs(difference)
    print(
        f"| {weights} | {inputs} | {runtime} | {size.mean():.4f} | {np.quantile(size, 0.99):.3f} | "
        f"{size.max():.2f} | {(size > 0.5).sum()} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
