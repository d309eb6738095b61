"""Files that a stranger made, or that lie in the way, against the commands that meet them.

Beside the files lie a bank and a model of the user: they must stay as they are, whatever comes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from liar_ext.models.recipe import Recipe
from liar_ext.system.checkpoint_store import VERSION, Checkpoint
from reliability.outcome import LIMIT, Outcome, in_child
from reliability.tampering import NASTY, cut_file, flip_bytes

TITLE = "files of strangers"
FULL, SHORT = 18, 6
MODULES = ("json", "numpy", "torch", "transformers", "runpy", "safetensors", "llama_cpp_py_sync")
FAST = ["--samples", "8", "--seq-len", "32", "--preset", "fast", "--keep", "0.7", "--quiet"]


def run(count: int, seed: int, work: Path) -> Iterator[Outcome]:
    """Make ``count`` attacks, of each kind in turn."""
    draw, own = random.Random(seed), _own(work)
    before = _contents(own)
    kinds = [_checkpoint, _exports, _gguf, _one_place, _output, _modules]
    for number in range(count):
        kind, room = kinds[number % len(kinds)], work / f"{number}"
        room.mkdir()
        what, call = kind(own, room, draw)
        verdict, detail, seconds = _outcome(call)
        if (room / "PWNED").exists():
            verdict = "code run"
        elif _contents(own) != before:
            verdict, before = "data lost", _contents(own)
        name = kind.__name__.strip("_").replace("_", " ")
        yield Outcome(TITLE, f"{number}: {name}, {what}", name, verdict, seconds, detail)
        shutil.rmtree(room)


def _outcome(call: Callable[[], tuple[str, str]]) -> tuple[str, str, float]:
    kind, answer, seconds = in_child(call, 4 * LIMIT)
    verdict, detail = answer if kind == "value" else (kind, str(answer))
    return ("traceback" if kind == "error" else verdict), detail, seconds


def _own(work: Path) -> Path:
    """Write a model, its text, a bank, a pruned folder and a GGUF file; return their folder."""
    import torch
    from folders import byte_level, equal_plan, pruned
    from tiny import batches, tiny

    from liar_ext import calibrate, save_pruned
    from liar_ext.export import export

    torch.set_num_threads(1)
    own, sizes = work / "own", {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    model = tiny("llama", num_key_value_heads=2, **sizes)
    model.save_pretrained(own / "model")
    byte_level().save_pretrained(own / "model")
    calibrate(model, batches(model, 2)).save(own / "a.bank")
    (own / "text.txt").write_text("a b b a " * 2000)
    small, plan = pruned("llama", equal_plan)
    save_pruned(small, own / "pruned", plan, tokenizer=byte_level())
    export(own / "model", "gguf", own / "model.gguf", check=False, progress=False)
    return own


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _command(*arguments: object) -> tuple[str, str]:
    """Run a command; return the verdict, and what it said."""
    from liar_ext import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(argument) for argument in arguments])
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(lines) == (code == 2) and code in (0, 1, 2), (code, said.getvalue())
    return ("done", "other outputs", "refused")[code], said.getvalue()


def _job(own: Path, folder: Path) -> dict:
    """Return the job of a stranger's checkpoint: its result is a bank of the user."""
    recipe = {"model": str(own / "model"), "calibration": [str(own / "text.txt")]}
    options = {"out": str(own / "a.bank"), "no_text": False, "sensitivities": False}
    job = {"version": VERSION, "command": "calibrate", "folder": str(folder), "options": options}
    return job | {"recipe": Recipe.build(**recipe, samples=8, seq_len=32).to_dict()}


def _checkpoint(own: Path, room: Path, draw: random.Random):
    """A checkpoint that says what is overwritten, whose files are links, pipes or the user's."""
    folder = room / "checkpoint"
    shutil.copytree(own / "model", folder)
    job, what = _job(own, room), draw.choice(["as it is", "lock", "pipe", "value"])
    if what == "lock":
        job["options"]["out"] = str(room / "new.bank")
    elif what == "pipe":
        os.mkfifo(folder / "calibration.safetensors")
    elif what == "value":
        part = draw.choice([job, job["recipe"], job["options"]])
        part[draw.choice(sorted(part))] = draw.choice(NASTY)
    with Checkpoint(folder) as saved:
        saved.put("job", facts=job)
    if what == "lock":
        (folder / ".lock").unlink()
        (folder / ".lock").symlink_to(own / "a.bank")
    kept = _contents(folder)

    def call() -> tuple[str, str]:
        answer = _command("resume", folder, "--quiet")
        theirs = [path for path in kept if Path(path).name not in ("job.safetensors", ".lock")]
        lost = [path for path in theirs if not os.path.exists(path)]
        return ("data lost", str(lost)) if lost else answer

    return what, call


def _exports(own: Path, room: Path, draw: random.Random):
    """A record of exports with pipes and nasty values."""
    folder = Path(shutil.copytree(own / "pruned", room / "pruned"))
    os.mkfifo(room / "pipe")
    entry = {"format": "gguf", "path": "../pipe", "bytes": 1, "sha256": None, "options": {}}
    record = {"version": 1, "exports": [entry]}
    what = draw.choice(["pipe", "value"])
    if what == "value":
        part = draw.choice([record, entry])
        part[draw.choice(sorted(part))] = draw.choice(NASTY)
    (folder / "liar/exports.json").write_text(json.dumps(record))
    return what, lambda: _command("verify", folder)


def _gguf(own: Path, room: Path, draw: random.Random):
    """A GGUF file with code and an adapter beside it, or that lacks a weight, or is damaged."""
    from liar_ext.checkpoint import load_model
    from liar_ext.system.errors import InputError

    path = room / "model.gguf"
    shutil.copy(own / path.name, path)
    what = draw.choice(["neighbours", "lacks", "flipped", "cut"])
    if what == "neighbours":
        code = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (room / "tokenizer_config.json").write_text(json.dumps(code))
        (room / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere"}')
        (room / "evil.py").write_text(f"open({str(room / 'PWNED')!r}, 'w')\n")
    elif what == "lacks":  # by another name, which is as long
        name = draw.choice([b"blk.1.attn_k.weight", b"blk.2.ffn_up.weight", b"output_norm.weight"])
        path.write_bytes(path.read_bytes().replace(name, b"x" * len(name)))
    else:
        apart = room / "apart"
        apart.mkdir()
        path = path.rename(apart / path.name)
        (flip_bytes if what == "flipped" else cut_file)(apart, draw, room / "PWNED")

    def call() -> tuple[str, str]:
        sys.stdin = io.StringIO("y\n" * 9)  # to transformers' question
        try:
            load_model(path)
        except InputError as error:
            return "refused", str(error)
        return ("wrong answer" if what == "lacks" else "done"), ""

    return what, call


def _one_place(own: Path, room: Path, draw: random.Random):
    """A result and a checkpoint of which one holds the other."""
    out, checkpoint = draw.choice([("x", "x"), ("x", "x/c"), ("c/x", "c"), ("c/../x", "x")])
    (room / "c").mkdir()
    command, option = draw.choice([("prune", "--out"), ("calibrate", "--out")])
    text = ["--calibration", own / "text.txt", *(FAST if command == "prune" else FAST[:4])]
    places = [option, room / out, "--checkpoint", room / checkpoint]

    def call() -> tuple[str, str]:
        verdict, said = _command(command, own / "model", *text, *places)
        return ("left behind" if os.listdir(room) != ["c"] else verdict), said

    return f"{command} {out} {checkpoint}", call


def _output(own: Path, room: Path, draw: random.Random):
    """A standard output that is closed, or full: the job is done, and no traceback shown."""
    shell = draw.choice([">&-", "> /dev/full", ">&- 2>&-"])
    words = [sys.executable, "-m", "liar_ext", "prune", own / "model"]
    words += ["--calibration", own / "text.txt", *FAST[:-1], "--out", room / "out"]
    command = f"{shlex.join(map(str, words))} {shell}"

    def call() -> tuple[str, str]:
        root = Path(__file__).parents[2]
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=root)
        if "Traceback" in done.stderr or done.returncode not in (0, 2):
            return "traceback", done.stderr
        there = (room / "out/liar/manifest.json").exists()
        return ("done" if there else "data lost"), done.stderr

    return shell, call


def _modules(own: Path, room: Path, draw: random.Random):
    """Files of the current folder that are named as modules, where processes are started."""
    for name in MODULES:
        (room / f"{name}.py").write_text(f"open({str(room / 'PWNED')!r}, 'w')\n")
    folder = shutil.copytree(own / "pruned", room / "pruned")
    short = ["--rounds", 1, "--prompt-length", 4, "--new-tokens", 2, "--batch", 1, "--quiet"]
    command = draw.choice(
        [
            ["verify", folder],
            ["bench", folder, "--against", own / "model", *short],
            ["export", own / "model", "--to", "gguf", "--out", room / "x.gguf", "--quiet"],
        ]
    )

    def call() -> tuple[str, str]:
        os.chdir(room)
        return _command(*command)

    return command[0], call
