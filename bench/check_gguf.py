"""Prune a model in three ways, export each as GGUF, and compare llama.cpp with transformers.

Prints a Markdown row per file: the perplexity that both compute on the same tokens, the greatest
difference between their log-likelihoods of a token, whether llama.cpp's tokenizer gives the same
tokens, and megabytes. A float32 file must agree to ``TOLERANCE``, of a mixture of experts in the
median, as rounding sends some tokens to other experts; the exit code says so.

    python bench/check_gguf.py MODEL --calibration TEXT --eval TEXT --out build/check-gguf
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from common import text_parser, windows_of
from llama_cpp_py_sync import Llama

from liar_ext.calibration.documents import read_documents
from liar_ext.checkpoint import load_model
from liar_ext.cli import main as liar
from liar_ext.export import export
from liar_ext.export.llama_cpp import run_file
from liar_ext.models.sites import sites

TOLERANCE = 1e-3  # in nats, of float32 sums in another order
FOLDERS = {
    "equal": ["--keep", "0.8", "--uniform-layers", "--tile", "32"],
    "unequal": ["--keep", "0.8", "--allocation", "global"],
    "blocks": ["--keep", "1", "--keep-blocks", "0.8"],
    "hidden": ["--keep", "0.8", "--keep-hidden", "0.9", "--uniform-layers", "--sites", "mlp"],
}
MIXTURES = {  # in their place, of a model with experts
    "equal": FOLDERS["equal"],
    "experts": ["--keep", "1", "--keep-experts", "0.75"],
    "both": ["--keep", "0.8", "--keep-experts", "0.75", "--uniform-layers", "--tile", "32"],
}
HEAD = (
    "| layers | type | architecture | transformers | llama.cpp | greatest difference, nats "
    "| tokens | MB |\n|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run all of it."""
    options = parse()
    torch.set_num_threads(1)  # as llama.cpp has
    options.out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(options.eval)
    print(HEAD)
    agree = True
    experts = any(site.experts for site in sites(load_model(options.model)[0], ("mlp",)))
    for name, choices in {"dense": None, **(MIXTURES if experts else FOLDERS)}.items():
        folder = options.out / name
        if choices is None:
            model, tokenizer = load_model(options.model)  # a GGUF file, for one
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            job = ["prune", options.model, "--calibration", *options.calibration]
            job += ["--samples", str(options.samples), "--out", str(folder)]
            job += ["--preset", "fast", "--overwrite", "--quiet", *choices]
            if liar(job):
                return 1
        model, tokenizer = load_model(folder)
        ids = windows_of(options.eval, tokenizer, options.seq_len, options.windows)
        ids = ids.input_ids.numpy()
        ours = likelihoods(model, ids)
        del model
        for kind in options.types:
            how = {"overwrite": True, "progress": False, "check": False, "quantize": kind}
            done = export(folder, "gguf", options.out / f"{name}-{kind}.gguf", **how)
            theirs = run_file(done.paths[0], ids)["nll"]
            difference = float(np.abs(ours - theirs).max())
            judged = float(np.median(np.abs(ours - theirs))) if experts else difference
            other = Llama(str(done.paths[0]), n_ctx=64, n_threads=1)
            same = all(
                other.tokenize(text, parse_special=True) == tokenizer(text).input_ids
                for text in documents[:20]
            )
            other.close()
            agree = agree and same and (kind != "f32" or judged <= TOLERANCE)
            print(
                f"| {name} | {kind} | {done.notes[0].split()[1].strip('.,:')} | "
                f"{math.exp(ours.mean()):.3f} | {math.exp(theirs.mean()):.3f} | {difference:.1e} | "
                f"{'same' if same else 'OTHERS'} | {done.bytes / 1e6:.1f} |",
                flush=True,
            )
            for note in done.notes[1:]:
                print(f"    {name}, {kind}: {note}", file=sys.stderr)
    return 0 if agree else 1


@torch.no_grad()
def likelihoods(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of each token but the first."""
    rows = []
    for sequence in torch.tensor(ids):
        scores = model(sequence[None]).logits[0, :-1].double().log_softmax(-1)
        rows.append(-scores.gather(-1, sequence[1:, None])[:, 0].numpy())
    return np.array(rows)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = text_parser(__doc__, samples=8, seq_len=512)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4, help="windows of the held-out text")
    parser.add_argument("--types", nargs="+", default=["f32", "q8_0"])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
