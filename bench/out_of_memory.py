"""Prune a model that doesn't fit into the memory that the operating system gives.

A random model is written to a folder, one block after the other. Then `liar prune --max-memory`
runs as a process that may take no more than a limit: of a memory control group of its own, version
2 or 1, which counts the page cache too, where this user may make one; else RLIMIT_DATA, for which
the shards must be smaller than the limit, as mapping one counts. Memory over time is drawn, and
the same command without `--max-memory` is run under the same limit, to show that it must fail.

What docs/scaling.md shows was run by `make out-of-memory` with these in OOM:

    --hidden 8192 --heads 4 --channels 512 --vocabulary 8000 --samples 2 --seq-len 64 --limit 1.4
        --spare 0.1 --runs default
    --hidden 4096 --channels 11008 --blocks 41 --vocabulary 4000 --samples 2 --limit 7.6 --spare 0
        --fixed-damp --runs one-pass
    the same with --blocks 2 --limit 10.1 --runs layerwise default
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import write_random_text
from safetensors.torch import save_file
from transformers import LlamaConfig

GIB = 2**30
EVERY = 0.2  # seconds between two looks at memory
DTYPE = torch.bfloat16
HEAD = 128  # features of a head


def main() -> None:
    """Make the model if it isn't there, prune it under the limit, and draw what it took."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    folder, text = options.out / "dense", options.out / "text.txt"
    write_model(folder, options)
    write_random_text(text, 400, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    limit = int(options.limit * GIB)
    command = [sys.executable, "-m", "liar_ext", "prune", str(folder), "--calibration", str(text)]
    command += ["--dtype", "bfloat16", "--samples", str(options.samples), "--overwrite"]
    command += ["--seq-len", str(options.seq_len), "--batch-size", str(options.batch_size)]
    rows = []
    for name, more in runs(options).items():
        out = options.out / f"pruned-{name}"
        run = [*command, *more, "--out", str(out)]
        if name != "whole":
            run += ["--max-memory", f"{options.limit - options.spare}GiB"]
        rows.append({"name": name, "size": size, **watched(run, limit, options.out / name)})
        rows[-1]["saved"] = (out / "config.json").exists()
        shutil.rmtree(out, ignore_errors=True)
        print(said(rows[-1]), flush=True)
        facts = {"shape": shape(options), "limit": limit, "runs": rows}
        (options.out / "out_of_memory.json").write_text(json.dumps(facts) + "\n")
        draw(facts, options.out / "out_of_memory.png")
    if options.remove:
        shutil.rmtree(folder)


def runs(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the options of each run."""
    fixed, found = ["--damp", "0.01"] if options.fixed_damp else [], {}
    for name in options.runs:
        schedule = "one-pass" if name == "whole" else name
        chosen = ["--schedule", schedule, "--allocation", "uniform"]
        found[name] = fixed if name == "default" else [*chosen, *fixed]
    return found


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Write config and random weights, a shard for each block."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    hidden, channels, heads = options.hidden, options.channels, options.heads
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=options.blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD,
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        scale = 1.0 if len(shape) == 1 else 0.7 * shape[-1] ** -0.5
        noise = torch.empty(shape, dtype=DTYPE).normal_(generator=generator)
        return noise.mul_(scale) if len(shape) > 1 else torch.ones(shape, dtype=DTYPE)

    where = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}-of-{options.blocks + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    for index in range(options.blocks):
        at = f"model.layers.{index}"
        tensors = {f"{at}.self_attn.{n}_proj.weight": draw(heads * HEAD, hidden) for n in "qkv"}
        tensors[f"{at}.self_attn.o_proj.weight"] = draw(hidden, heads * HEAD)
        tensors |= {f"{at}.mlp.{n}_proj.weight": draw(channels, hidden) for n in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = draw(hidden, channels)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{at}.{norm}.weight": draw(hidden) for norm in norms}
        write(index + 1, tensors)
    outer = {"model.norm.weight": draw(hidden)}
    outer |= {
        f"{n}.weight": draw(options.vocabulary, hidden) for n in ("model.embed_tokens", "lm_head")
    }
    write(options.blocks + 1, outer)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def watched(command: list[str], limit: int, log: Path) -> dict[str, object]:
    """Run a command under a limit of memory; return how it ended, and its memory over time."""
    start = time.perf_counter()
    samples = []
    with group(limit) as enter, open(log.with_suffix(".log"), "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=enter or (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))),
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )
        while process.poll() is None:
            facts = status(process.pid)
            if facts:
                samples.append([round(time.perf_counter() - start, 2), *facts])
            time.sleep(EVERY)
    return {
        "command": command[1:],
        "enforced by": "control group" if enter else "RLIMIT_DATA",
        "exit": process.returncode,
        "seconds": time.perf_counter() - start,
        "peak": max((each[1] for each in samples), default=0),
        "peak_own": max((each[2] for each in samples), default=0),
        "samples": samples,
    }


def status(process: int) -> tuple[int, int] | None:
    """Return the resident bytes of a process, and those of them that are no file's."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmRSS" not in facts:
        return None
    return tuple(int(facts[name].split()[0]) << 10 for name in ("VmRSS", "RssAnon"))


@contextmanager
def group(limit: int) -> Iterator:
    """Make a control group of that limit; give what a process enters it by, or None."""
    made = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        one = "memory" in controllers.split(",")
        if not (one or (not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists())):
            continue
        root = Path("/sys/fs/cgroup/memory" if one else "/sys/fs/cgroup")
        name = root / path.lstrip("/") / f"liar-{os.getpid()}"
        file = "memory.limit_in_bytes" if one else "memory.max"
        try:
            name.mkdir()
            made = name
            (name / file).write_text(str(limit))
            if not one:
                (name / "memory.swap.max").write_text("0")
            break
        except OSError:
            if made is not None:
                made.rmdir()
            made = None
    try:
        yield made and (lambda: (made / "cgroup.procs").write_text(str(os.getpid())))
    finally:
        if made is not None:
            made.rmdir()


def shape(options: argparse.Namespace) -> str:
    """Return the shape of the model in words."""
    return (
        f"{options.blocks} blocks of hidden size {options.hidden}, {options.heads} heads, "
        f"{options.channels} channels"
    )


def said(row: dict) -> str:
    """Return one line on a run."""
    end = "saved" if row["saved"] else f"ended with code {row['exit']}, nothing saved"
    return (
        f"{row['name']}: {row['size'] / GIB:.2f} GiB of weights, peak {row['peak'] / GIB:.2f} GiB "
        f"resident ({row['peak_own'] / GIB:.2f} without mapped files), {row['seconds']:.0f} s, "
        f"{end} (limit by {row['enforced by']})"
    )


def draw(facts: dict, path: Path) -> None:
    """Draw memory over time, with the limit and the size of the weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in facts["runs"]:
        times = [each[0] for each in row["samples"]]
        label = row["name"] if row["saved"] else f"{row['name']}: not saved"
        own = axes.plot(times, [each[2] / GIB for each in row["samples"]], label=label)
        resident = [each[1] / GIB for each in row["samples"]]
        axes.plot(times, resident, color=own[0].get_color(), alpha=0.3, linewidth=0.8)
    size = facts["runs"][0]["size"] / GIB
    axes.axhline(size, color="black", linestyle=":", label="weights of the dense model")
    axes.axhline(facts["limit"] / GIB, color="red", linestyle="--", label="limit")
    axes.set(
        xlabel="seconds",
        ylabel="memory (faint: with mapped files), GiB",
        ylim=(0, None),
        title=facts["shape"],
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/out_of_memory"))
    add("--hidden", type=int, default=2048)
    add("--channels", type=int, default=2048)
    add("--heads", type=int, help=f"of {HEAD} features; as many as the hidden size has otherwise")
    add("--blocks", type=int, default=48)
    add("--vocabulary", type=int, default=32000)
    add("--limit", type=float, default=1.43, help="GiB that the process may take")
    add("--spare", type=float, default=0.05, help="GiB less than that for --max-memory")
    add("--samples", type=int, default=4)
    add("--seq-len", type=int, default=128)
    add("--batch-size", type=int, default=2)
    add("--fixed-damp", action="store_true", help="no choice of λ, which saves time")
    add("--runs", nargs="+", default=["one-pass", "layerwise", "whole"])
    add("--remove", action="store_true", help="remove the dense model in the end")
    options = parser.parse_args()
    options.heads = options.heads or options.hidden // HEAD
    return options


if __name__ == "__main__":
    main()
