"""Bad command lines: each must end in one line and exit code 2, before the model is run.

``python tests/reliability/commands.py`` runs all of them and prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from folders import tokenizer
from tiny import tiny
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

TITLE = "bad command lines"
SHORT = 12
Line = tuple[str, ...]

# Options of `liar prune` with values that it must refuse; "{...}" is a file of `make_inputs`.
VALUES = {
    "--samples": ["0", "-1", "1", "2.5", "many", "", "1e3", "9" * 20, "9" * 5000],
    "--seq-len": ["0", "-1", "1", "x", "", str(2**63), "65", "100000"],
    "--batch-size": ["0", "-1", "1.5", "x", "", "-" + "9" * 30],
    "--seed": ["-1", str(2**70), "1.5", "nan", ""],
    "--memory": ["nan", "inf", "-inf", "1e300", "0", "-1", "", "lots", "1e-400"],
    "--keep": ["0", "-1", "1.5", "80", "nan", "inf", "", "0,8", "0.01", "1e-300", "x" * 5000],
    "--of": ["bytes", "", "PARAMS"],
    "--tile": ["0", "-32", "7", "32.0", "x", "", "AUTO", "9" * 30],
    "--multiple-of": ["0", "-8", "x", "", "0.5"],
    "--at-least": ["0", "-1", "x", "999999"],
    "--keep-hidden": ["0", "-0.1", "1.5", "nan", "0.001", "", "half"],
    "--sites": ["ffn", "", "attn,mlp"],
    "--attn-unit": ["token", ""],
    "--criterion": ["best", "", " ", "wifv ", "\udcff"],
    "--allocation": ["fair", "", "curves"],
    "--refine": ["-1", "x", "1.5"],
    "--candidates": ["", "obs", "keep=0.5", "criterion=best", "damp={a", "refine=1,", "\udcff=1"],
    "--judge": ["0", "1", "-1", "x", ""],
    "--reconstruct": ["ridge", ""],
    "--damp": ["much", "-1", "nan", "", "1e-3x"],
    "--schedule": ["two-pass", ""],
    "--target": ["dense", ""],
    "--dtype": ["int8", "", "float"],
    "--device": ["cuda:99", "gpu", "", "cpu:x", "meta:", "\udcff"],
    "--eval": ["", " ", "{absent}.txt", "{text}", "{latin}", "{empty}", "{short}", "a\0b"],
    "--eval-samples": ["0", "-1", "x", "1.5"],
    "--certify": ["-1", "1", "x", "", "9" * 30],
    "--calibration": [
        *("", "{absent}.txt", "{latin}", "{empty}", "{short}", "{nothing}", "\udcff"),
        *("{no_field}", "{no_json}", "{deep}", "a\0b", "{binary}"),
    ],
    "--out": ["", " ", "{text}", "{text}/below", "{nothing}/" + "x" * 300, "a\udcff", "a\0b"],
    "--recipe": [
        *("", "{absent}", "{nothing}", "{binary}", "{tag}", "{alias}", "{deep_yaml}", "{unknown}"),
        *("{wrong}", "{twice}", "{huge}", "a\0b"),
    ],
    "--preset": ["quick", ""],
}
# Beside a valid job.
ADDED: list[Line] = [
    ("--refine", "2", "--allocation", "uniform"),
    ("--refine", "1", "--memory", "1e-9"),
    ("--candidates", "criterion=obs", "--max-memory", "8GiB"),
    ("--refit", "--schedule", "one-pass"),
    ("--target", "branch", "--schedule", "one-pass"),
    ("--schedule", "layerwise", "--reconstruct", "none"),
    ("--keep-hidden", "0.9", "--multiple-of", "64"),
    ("--keep-hidden", "0.9", "--tile", "64"),
    ("--tile", "16", "--multiple-of", "16"),
    ("--preset", "fast", "--recipe", "{unknown}"),
    ("--keep", "0.7", "--uniform-layers", "yes"),
    ("--bogus",),
    ("--seed",),
    ("extra",),
    ("--memory", "1", "2"),
    ("--eval", "{text}", "--eval-samples", "0"),
    ("--criterion", "taylor", "--schedule", "layerwise", "--reconstruct", "bias"),
]
MODELS = ["", " ", "{absent}", "{text}", "{nothing}", "{no_config}", "{bare}", "{nan}", "a\0b"]
SMALL = ("--calibration", "{text}", "--seq-len", "8", "--samples", "8")
BANKS = ["", "{absent}", "{text}", "{texts}", "{model}/model.safetensors", "{torn}", "a\0b"]
OTHERS: list[Line] = [
    (),
    ("",),
    ("--bogus",),
    ("shrink",),
    ("prune",),
    ("prune", "{model}"),
    ("prune", "--out", "{new}"),
    ("prune", "{model}", "--out", "{new}"),
    ("prune", "{model}", "--calibration", "{text}"),
    ("prune", "--calibration", "{text}", "{model}", "--out", "{new}"),
    ("prune", "{model}", "--calibration", "--out", "{new}"),
    ("prune", "{model}", "{model}", "--calibration", "{text}", "--out", "{new}"),
    ("prune", "{model}", "--calibration", "{text}", "--out", "{nothing}", "--keep", "0.7"),
    ("prune", "{model}", "--calibration", "{text}", "--out", "{texts}", "--overwrite"),
    ("prune", "{model}", "--calibration", "{text}", "--dry-run", "--keep", "0"),
    ("prune", "{bert}", "--calibration", "{text}", "--out", "{new}", "--eval", "{held_out}")
    + ("--seq-len", "8"),
    ("prune", "{model}", "--calibration", "{text}", "--dry-run", "--keep", "0.001"),
    ("info", "extra"),
    ("info", "--bogus"),
    ("eval",),
    ("eval", "{model}"),
    ("eval", "--text", "{text}"),
    # Of a model that isn't finite only a run tells what perplexity it has.
    *(("eval", m, "--text", "{text}", "--seq-len", "8") for m in MODELS if m != "{nan}"),
    ("eval", "{bert}", "--text", "{text}", "--seq-len", "8"),
    *(
        ("eval", "{model}", "--text", "{text}", option, value)
        for option, values in {
            "--samples": ["0", "-3", "x", "", "9" * 30],
            "--seq-len": ["0", "1", "-1", "x", "9" * 30, "100000"],
            "--batch-size": ["0", "-1", "x"],
            "--dtype": ["int8"],
            "--device": ["gpu", "cuda:99", ""],
        }.items()
        for value in values
    ),
    *(
        ("eval", "{model}", "--seq-len", "8", "--text", text)
        for text in ("", "{absent}.txt", "{latin}", "{empty}", "{short}", "{no_field}", "a\0b")
    ),
    *(
        ("calibrate", "{model}", *SMALL, "--bank", "{new}", option, value)
        for option, values in {
            "--bank": ["", " ", "{text}", "{texts}", "{absent}/bank", "{model}", "a\0b", "\udcff"],
            "--checkpoint": ["", " ", "{text}", "{texts}", "{text}/below", "{model}", "a\0b"],
            "--calibration": ["", "{absent}.txt", "{empty}", "{short}", "{binary}"],
            "--samples": ["0", "x", "", "1"],
            "--seq-len": ["0", "x", "100000"],
            "--probe-keep": ["0", "2", "x", "nan"],
            "--criterion": ["best", ""],
        }.items()
        for value in values
    ),
    ("calibrate",),
    ("calibrate", "{model}"),
    ("calibrate", "{model}", *SMALL),
    ("calibrate", "--bank", "{new}", *SMALL),
    ("calibrate", "{model}", *SMALL, "--bank", "{new}", "--keep", "0.7"),
    ("calibrate", "{model}", *SMALL, "--bank", "{new}", "--memory", "1"),
    *(("calibrate", m, *SMALL, "--bank", "{new}") for m in MODELS),
    ("merge",),
    ("merge", "{bank}"),
    ("merge", "{bank}", "-o", "{new}"),
    ("merge", "{bank}", "{bank}", "-o", "{new}"),
    ("merge", "{bank}", "{same}", "-o", "{new}"),
    ("merge", "{bank}", "{other}", "-o", "{new}"),
    *(("merge", "{bank}", bad, "-o", "{new}") for bad in BANKS),
    *(
        ("merge", "{bank}", "{more}", "-o", out)
        for out in ("", "{bank}", "{text}", "{texts}", "{absent}/b", "{nothing}", "a\0b")
    ),
    ("merge", "{bank}", "{more}", "-o", "{text}", "--overwrite"),
    ("sweep",),
    ("sweep", "{model}"),
    ("sweep", "--bank", "{bank}"),
    *(("sweep", "{model}", "--bank", bad) for bad in [*BANKS, "{other}"]),
    *(("sweep", m, "--bank", "{bank}") for m in MODELS),
    *(
        ("sweep", "{model}", "--bank", "{bank}", *more)
        for more in (
            ("--keep", "0"),
            ("--keep", "1.5", "0.8"),
            ("--keep", "0.8", "0.8"),
            ("--keep",),
            ("--keep", "x"),
            ("--keep", "0.001"),
            ("--samples", "8"),
            ("--certify", "4"),
            ("--keep-hidden", "0.9"),
            ("--out", "{text}"),
            ("--out", "{model}/config.json"),
            ("--eval", "{absent}.txt"),
            ("--dtype", "bfloat16"),
            ("--checkpoint", "{new}"),
        )
    ),
    *(("prune", "{model}", "--bank", bad, "--out", "{new}") for bad in [*BANKS, "{other}"]),
    *(
        ("prune", "{model}", "--bank", "{bank}", "--out", "{new}", *more)
        for more in (
            ("--calibration", "{text}"),
            ("--samples", "8"),
            ("--certify", "4"),
            ("--keep-hidden", "0.9"),
            ("--max-memory", "4GiB"),
            ("--dry-run",),
            ("--dtype", "bfloat16"),
        )
    ),
    *(
        ("prune", "{model}", *SMALL, "--out", "{new}", *more)
        for more in (
            *(("--max-memory", size) for size in ("", "12", "GiB", "-1GiB", "0GiB", "1MiB", "x")),
            ("--max-memory", "4GiB", "--memory", "1"),
            ("--max-memory", "4GiB", "--refine", "1"),
            ("--max-memory", "4GiB", "--criterion", "taylor"),
            ("--max-memory", "4GiB", "--keep-hidden", "0.9"),
            ("--max-memory", "4GiB", "--of", "latency"),
            ("--max-memory", "4GiB", "--device", "auto"),
            ("--max-memory", "4GiB", "--calibration", "self"),
            *(
                ("--checkpoint", folder)
                for folder in ("", "{text}", "{texts}", "{text}/below", "{model}", "a\0b")
            ),
            ("--checkpoint", "{new}-c", "--of", "latency"),
            ("--checkpoint", "{new}-c", "--keep", "0.001"),
            ("--checkpoint", "{new}-c", "--max-memory", "1MiB"),
        )
    ),
    ("resume",),
    *(("resume", f) for f in ("", "{absent}", "{nothing}", "{text}", "{model}", "{jobs}", "a\0b")),
    ("resume", "{nothing}", "{nothing}"),
    ("resume", "{nothing}", "--keep", "0.7"),
    ("families", "extra"),
    ("families", "--bogus"),
    *(("families", "--suggest", m) for m in MODELS if m not in ("{nan}", "{bare}")),
    ("verify",),
    *(("verify", folder) for folder in ("", " ", "{absent}", "{model}", "{text}", "{nothing}")),
    ("verify", "a\0b"),
    ("verify", "{model}", "--device", "gpu"),
    ("verify", "{model}", "--bogus"),
    *((name,) for name in ("report", "compare", "bench")),
    *(
        (name, folder)
        for name in ("report", "compare")
        for folder in ("", " ", "{absent}", "{model}", "{text}", "{nothing}", "a\0b")
    ),
    ("report", "{model}", "{model}"),
    ("report", "{model}", "-o", ""),
    ("report", "{model}", "-o", "{text}"),
    ("compare", "{model}", "-o", "{absent}/x.html"),
    ("bench", "{model}"),
    *(
        ("bench", "{model}", "--against", "{model}", option, value)
        for option, values in {
            "--rounds": ["0", "-1", "x", "9" * 30],
            "--batch": ["0", "x", ""],
            "--prompt-length": ["0", "x"],
            "--new-tokens": ["0", "x"],
            "--threads": ["0", "x"],
            "--dtype": ["int8"],
            "--device": ["gpu", "cuda:99", ""],
            "--json": ["", "{text}", "{texts}", "{absent}/x.json", "a\0b"],
        }.items()
        for value in values
    ),
]


def lines() -> list[Line]:
    """Return every command line, with names of inputs still in braces."""
    found = []
    for option, values in VALUES.items():
        for value in values:
            job = {"--calibration": "{text}", "--out": "{new}", "--seq-len": "8", "--samples": "8"}
            job[option] = value
            found.append(("prune", "{model}", *itertools.chain(*job.items())))
    valid = ("--calibration", "{text}", "--out", "{new}", "--seq-len", "8", "--samples", "8")
    found += [("prune", "{model}", *valid, *more) for more in ADDED]
    found += [("prune", model, *valid) for model in MODELS]
    return [*found, *OTHERS]


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
    (paths["jobs"] / "job.json").write_text('{"version": 2, "command": "sweep"}')


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
    errors = [line for line in said if line.startswith("liar: error: ")]
    if snapshot(work) != before:
        return "left behind", err.getvalue()
    if code != 2 or len(errors) != 1 or not said[-1].startswith("liar: error: "):
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


def main() -> int:
    """Run every command line; exit code 1 if one isn't refused as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        paths = make_inputs(Path(folder))
        bad = []
        for line in lines():
            verdict, said = attempt(fill(line, paths), Path(folder))
            if verdict != "refused":
                bad.append(verdict)
                print(f"{verdict}: {line!a:.300}\n{said!a:.3000}", file=sys.stderr)
    counts = {f"{verdict}s": bad.count(verdict) for verdict in ("traceback",)}
    print(json.dumps({"what": TITLE, "tried": FULL, **counts, "bad": len(bad)}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
