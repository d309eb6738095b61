"""The main job on a real model: prune SmolLM2-135M-Instruct to 80 %, save, reload, verify."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import assets
import torch

from liar_ext import cli
from liar_ext.checkpoint import load_model, load_pruned

QUESTION = "In one sentence: why is the sky blue?"


def main() -> None:
    """Run the demo and print what a newcomer wants to know."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    out = parser.parse_args().out
    texts = assets.write_texts(out / "texts")
    folder = out / "SmolLM2-135M-pruned"
    model = assets.smollm2()

    command = (
        f"prune {shlex.quote(str(model))} --calibration {texts['web']} {texts['news']} "
        f"--eval {texts['held_out_news']} --eval-samples 12 --keep 0.8 "
        f"--samples 48 --seq-len 512 --out {folder} --overwrite"
    )
    run(command)
    run(f"verify {folder}")

    print("\nThe same question to both models:")
    dense, tokenizer = load_model(str(model))
    print(f"  dense : {answer(dense, tokenizer)}")
    print(f"  pruned: {answer(load_pruned(folder), tokenizer)}")
    print_table(json.loads((folder / "liar_report.json").read_text()), folder)


def run(command: str) -> None:
    """Run one ``liar`` command in this process; stop if it fails."""
    print(f"\n$ liar {command}", flush=True)
    code = cli.main(shlex.split(command))
    if code:
        raise SystemExit(code)


def answer(model, tokenizer) -> str:
    """Return the model's greedy answer to the question."""
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def print_table(report: dict, folder: Path) -> None:
    """Print the result in words."""
    params, seconds = report["params"], report["seconds"]
    dense, pruned = report["evaluation"]["dense"], report["evaluation"]["pruned"]
    rows = [
        ("", "dense", "pruned"),
        ("parameters (millions)", f"{params['before'] / 1e6:.1f}", f"{params['after'] / 1e6:.1f}"),
        (
            "of which prunable (millions)",
            f"{params['prunable_before'] / 1e6:.1f}",
            f"{params['prunable_after'] / 1e6:.1f}",
        ),
        (
            "perplexity on news it never saw (lower is better)",
            f"{dense['perplexity']:.2f}",
            f"{pruned['perplexity']:.2f}",
        ),
    ]
    print()
    for title, left, right in rows:
        print(f"{title:52}{left:>10}{right:>10}")
    print(
        f"\nPerplexity over {dense['tokens']:,} tokens in windows of {dense['seq_len']}. "
        f"No retraining: calibrating took {seconds['calibrate']:.0f} s, solving "
        f"{seconds['reconstruct']:.0f} s, all of it {seconds['total']:.0f} s.\n"
        f"Model: {folder}   Report: {folder / 'liar_report.md'}"
    )


if __name__ == "__main__":
    main()
