"""Bad command lines: each must end in one line and exit code 2, before the model is run."""

from __future__ import annotations

import contextlib
import io
import random
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from folders import tokenizer
from tiny import tiny
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from liar_ext.system.checkpoint_store import VERSION, Checkpoint
from reliability.command_lines import Line, lines

TITLE = "bad command lines"
SHORT = 12
FULL = len(lines())


def make_inputs(work: Path) -> dict[str, str]:
    """Write models, texts and recipes, good ones and bad ones; return their paths by name."""
    texts = work / "texts"
    texts.mkdir()
    contents: dict[str, str | bytes] = {
        "text": "a b b a " * 2000,
        "held_out": "b a b b " * 2000,
        "short": "a b",
        "empty": " \n",
        "latin": b"caf\xe9 " * 500,
        "binary": bytes(range(256)) * 8,
        "no_field.jsonl": '{"words": "a b"}\n' * 9,
        "no_json.jsonl": "a b\n" * 9,
        "deep.jsonl": "[" * 50000 + "\n",
        "tag": "keep: !!python/object/apply:os.system [x]",
        "alias": "keep: &a 0.5\nkeep_hidden: *a",
        "deep_yaml": "[" * 5000,
        "unknown": "kep: 0.5",
        "wrong": "samples: [1, 2]",
        "twice": "keep: 0.5\nkeep: 0.6",
        "huge": "seed: 0x" + "f" * 9000,
    }
    paths = {"texts": texts, "nothing": work / "nothing", "new": work / "new"}
    for name, content in contents.items():
        path = texts / (name if "." in name else f"{name}.txt")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths[name.split(".")[0]] = path
    paths["nothing"].mkdir()
    for name in ("model", "bare", "nan", "bert", "no_config"):
        paths[name] = work / name
        model = tiny("bert" if name == "bert" else "llama")
        if name == "nan":
            next(model.parameters()).data.view(-1)[0] = float("nan")
        model.save_pretrained(paths[name])
        if name != "bare":
            tokenizer().save_pretrained(paths[name])
    (paths["no_config"] / "config.json").write_text("{")
    _make_banks(texts, paths)
    return {**{name: str(path) for name, path in paths.items()}, "absent": str(work / "absent")}


def _make_banks(folder: Path, paths: dict[str, Path]) -> None:
    """Write moment banks: two of one model, one twice, one of another, one that is torn."""
    from tiny import batches

    from liar_ext import calibrate

    model, other = tiny("llama"), tiny("llama", seed=3)
    data = batches(model, 4)
    for name, bank in {
        "bank": calibrate(model, data[:2]),
        "more": calibrate(model, data[2:]),
        "other": calibrate(other, data[2:]),
    }.items():
        paths[name] = folder / f"{name}.bank"
        bank.save(paths[name])
    paths["same"], paths["torn"] = folder / "same.bank", folder / "torn.bank"
    paths["same"].write_bytes(paths["bank"].read_bytes())
    paths["torn"].write_bytes(paths["bank"].read_bytes()[:-9])
    paths["jobs"] = folder / "jobs"
    paths["jobs"].mkdir()
    with Checkpoint(paths["jobs"]) as saved:
        saved.put("job", facts={"version": VERSION, "command": "sweep"})


def fill(line: Line, paths: dict[str, str]) -> list[str]:
    """Return a command line with the paths of its inputs."""
    filled = []
    for word in line:
        for name, path in paths.items():
            word = word.replace(f"{{{name}}}", path)
        filled.append(word)
    return filled


def snapshot(work: Path) -> dict[str, tuple[int, int]]:
    """Return every file and folder with its time and size."""
    found = ((str(path), path.lstat()) for path in work.rglob("*"))
    return {path: (facts.st_mtime_ns, facts.st_size) for path, facts in found}


def attempt(arguments: list[str], work: Path) -> tuple[str, str]:
    """Run a command line in this process; return its verdict and what it said."""
    from liar_ext import cli

    def refuse(module, inputs):
        if isinstance(module, PreTrainedModel):
            raise AssertionError("the model was run")

    out, err, before = io.StringIO(), io.StringIO(), snapshot(work)
    hook = register_module_forward_pre_hook(refuse)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(arguments)
            except SystemExit as end:
                code = end.code
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        hook.remove()
    said = err.getvalue().strip().splitlines()
    said = [line for line in said if not line.startswith("hint: ")]
    errors = [line for line in said if line.startswith("error: ")]
    if snapshot(work) != before:
        return "left behind", err.getvalue()
    if code != 2 or len(errors) != 1 or not said[-1].startswith("error: "):
        return "traceback", f"exit code {code}, said: {err.getvalue()}{out.getvalue()}"
    return ("refused" if len(said[-1]) <= 400 else "traceback"), said[-1]


def run(count: int, seed: int, work: Path) -> Iterator:
    """Yield what came of ``count`` command lines, drawn by seed; of all from ``FULL`` on."""
    from reliability.outcome import Outcome

    torch.set_num_threads(1)
    paths = make_inputs(work)
    chosen = random.Random(seed).sample(lines(), min(count, FULL))
    for index, line in enumerate(chosen):
        start = time.monotonic()
        verdict, said = attempt(fill(line, paths), work)
        seconds = time.monotonic() - start
        call = ascii(" ".join(("liar", *(word[:40] for word in line))))
        yield Outcome(TITLE, f"{index}: {call}", call, verdict, seconds, said)
