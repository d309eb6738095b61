"""The README's lines, run in order on a tiny model, by whatever Python runs this script.

    python tests/readme.py FOLDER

Makes a tiny model and texts in FOLDER under the names that the README has for them, and runs there
every `liar` command of its blocks and of its running text, its Python block, and the two ways to
load that its table names. No network is asked. Nothing of this repository is imported but liar_ext,
as it is installed: `make check-readme` runs it where there is only the wheel.
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
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 128}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
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
    """Return the command lines of ``liar``: of indented blocks, then of the running text."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^    (liar .*)$", text, re.MULTILINE)
    found += [line for line in re.findall(r"`(liar [^`\n]+)`", text) if len(line.split()) > 2]
    return list(dict.fromkeys(found))


def run(words: list[str], where: Path) -> None:
    """Run a command, print it, and stop at a failure."""
    print("$", " ".join(words), flush=True)
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, errors="replace")
    print("\n".join(done.stdout.splitlines()[-3:]), flush=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    """Run all of it."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    os.environ.pop("PYTHONPATH", None)
    make_model(folder / "MODEL")
    make_model(folder / HUB)
    make_texts(folder)
    text = README.read_text(encoding="utf-8")
    liar = str(Path(sys.executable).with_name("liar"))
    lines = commands(text)
    assert len(lines) >= 4, lines
    for line in lines:
        words = shlex.split(line.split("#")[0])
        run([liar, *words[1:]], folder)
    loads = re.findall(r"from_pretrained\(folder.*?\)", text)
    assert len(loads) == 2 and "trust_remote_code=True" in loads[1], loads
    # Without liar_ext, as the table says; equal layers first.
    options = ["--calibration", "text.jsonl", "--uniform-layers", "--out", "equal/", "--quiet"]
    run([liar, "prune", "MODEL", *options], folder)
    for name, load in zip(("equal", "pruned"), loads, strict=True):
        code = "import sys; sys.modules['liar_ext'] = None; folder = sys.argv[1]\n"
        code += "from transformers import AutoModelForCausalLM\n"
        code += f"print(AutoModelForCausalLM.{load}.num_parameters(), 'parameters')"
        run([sys.executable, "-c", code, name], folder)
    (folder / "pruned").rename(folder / "by-command")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    run([sys.executable, "-c", block], folder)
    run([liar, "verify", "pruned/"], folder)
    print("every line of the README runs")


if __name__ == "__main__":
    main()
