"""The README's lines, run in order on a tiny model, by whatever Python runs this script.

    python tests/readme.py FOLDER

Makes a tiny model and texts in FOLDER under the names that the README has for them, and runs there
every `liar` command of its blocks and of its running text, its Python block, and the two ways to
load that its table names. No network is asked. Nothing of this repository is imported but liar_ext,
as it is installed: `make check-readme` runs it where there is only the wheel.

The first command is run as it stands. What follows runs in processes that are forked from this one,
which has imported torch and transformers and does nothing else: they begin without liar_ext, as new
ones do, and without the seconds that those imports take.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import string
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of this name is found before the hub is


def make_model(folder: Path) -> None:
    """Write a tiny Llama with a tokenizer of single characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["[PAD]", "[BOS]", "[EOS]", *string.ascii_lowercase, " ", "."]
    vocabulary = {character: at for at, character in enumerate(characters)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **heads))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_texts(folder: Path) -> None:
    """Write calibration text, and held-out text that is none of it."""
    draw = random.Random(0)
    documents = [
        " ".join("".join(draw.choices(string.ascii_lowercase, k=5)) for _ in range(500))
        for _ in range(160)
    ]
    lines = (json.dumps({"text": text}) + "\n" for text in documents[:120])
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "held_out.txt").write_text("\n\n".join(documents[120:]), encoding="utf-8")


def commands(text: str) -> list[str]:
    """Return the command lines of ``liar``: of blocks of code, then of the running text."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^(?:    )?(liar .*)$", text, re.MULTILINE)
    found += [line for line in re.findall(r"`(liar [^`\n]+)`", text) if len(line.split()) > 2]
    return list(dict.fromkeys(found))


def run(words: list[str], where: Path, call: Callable[[], object] | None = None) -> None:
    """Run a command, or a call in a process of its own, print it, and stop at a failure."""
    print("$", " ".join(words), flush=True)
    if call:
        code, said = apart(words, where, call)
    else:
        done = subprocess.run(words, cwd=where, capture_output=True, text=True, errors="replace")
        code, said = done.returncode, done.stdout + done.stderr
    print("\n".join(said.splitlines()[-3:]), flush=True)
    if code:
        raise SystemExit(f"exit code {code}\n{said[-6000:]}")


def apart(words: list[str], where: Path, call: Callable[[], object]) -> tuple[int, str]:
    """Return the exit code and the output of a call in a fork, where ``words`` are `sys.argv`."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.chdir(where)
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                sys.argv = words
                code = call() or 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def command() -> int:
    """Do what the command does."""
    from liar_ext.cli import main

    return main()


def load_without_liar_ext(load: str) -> None:
    """Load ``folder``, the last of `sys.argv`, by a line of the README."""
    sys.modules["liar_ext"] = None
    from transformers import AutoModelForCausalLM

    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "folder": sys.argv[-1]}
    print(eval(f"AutoModelForCausalLM.{load}", names).num_parameters(), "parameters")


def main() -> None:
    """Run all of it."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    os.environ.pop("PYTHONPATH", None)
    import_module("transformers.models.llama.modeling_llama")
    run(["make", "MODEL"], folder, lambda: make_model(folder / "MODEL"))
    run(["make", HUB], folder, lambda: make_model(folder / HUB))
    make_texts(folder)
    text = README.read_text(encoding="utf-8")
    liar = str(Path(sys.executable).with_name("liar"))
    lines = commands(text)
    assert len(lines) >= 3, lines
    for at, line in enumerate(lines):
        words = shlex.split(line.split("#")[0])
        run([liar, *words[1:]], folder, command if at else None)
    loads = re.findall(r"from_pretrained\(folder.*?\)", text)
    assert len(loads) == 2 and "trust_remote_code=True" in loads[1], loads
    # Without liar_ext, as the table says; equal layers first.
    options = ["--calibration", "text.jsonl", "--uniform-layers", "--out", "equal/", "--quiet"]
    run([liar, "prune", "MODEL", *options], folder, command)
    for name, load in zip(("equal", "pruned"), loads, strict=True):
        run(["load", load, name], folder, lambda load=load: load_without_liar_ext(load))
    (folder / "pruned").rename(folder / "by-command")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    run(["the block of Python"], folder, lambda: exec(block, {"__name__": "__main__"}))
    run([liar, "verify", "pruned/"], folder, command)
    print("every line of the README runs")


if __name__ == "__main__":
    main()
