"""The pruned folders of the matrix, and the texts, tokens and task that cells run on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measures import script

EQUAL = ("--uniform-layers", "--allocation", "uniform")
LAYERS = {
    "equal": EQUAL,
    "unequal": ("--allocation", "global"),
    "hidden": (*EQUAL, "--keep-hidden", "0.8"),
    "tokens": (*EQUAL, "--keep-vocab", "0.5"),
    "blocks": ("--keep-blocks", "0.75"),
}
FAMILIES = {
    "Llama-like": "SmolLM2-135M-Instruct",
    "Qwen2": "a random Qwen2 of 4 layers, 128 features, 4 heads and 512 channels",
    "BERT-like": "all-MiniLM-L6-v2",
}
AUTO = {"BERT-like": "AutoModel"}
# The config of BERT has no field for fewer heads: with equal layers only channels are pruned.
MORE = {("BERT-like", each): ("--sites", "mlp") for each in ("equal", "hidden", "tokens")}
WINDOWS, TOKENS, ITEMS = 2, 256, 40
SENTENCES = (
    "A plane is taking off.",
    "The history of the city began with a small harbour on the northern bank of the river.",
    "Shares fell sharply after the company had said that profits would be lower this year.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
)


def dense_models(out: Path, llama: Path, bert: Path) -> dict[str, Path]:
    """Return the folder of each family's dense model; the Qwen2 is made here."""
    qwen2 = out / "dense-qwen2"
    if not qwen2.exists():
        import torch
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(llama)
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
            max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Biases, and layers of which some matter more, so that importance has an order.
                scale = 0.05 * (1 + sum(name.split(".")[2] == str(at) for at in (1, 2)))
                parameter.add_(scale * torch.randn_like(parameter))
        model.save_pretrained(qwen2)
        tokenizer.save_pretrained(qwen2)
    return dict(zip(FAMILIES, (llama, qwen2, bert), strict=True))


def prune(dense: Path, out: Path, family: str, layers: str, text: Path) -> None:
    """Make one folder by the command, unless it is there."""
    if out.exists():
        return
    options = ["--calibration", str(text), "--samples", "8", "--seq-len", "128"]
    options += ["--keep", "1" if layers == "blocks" else "0.8"]
    options += ["--preset", "fast", "--quiet", "--out", str(out)]
    options += [*LAYERS[layers], *MORE.get((family, layers), ())]
    command = [sys.executable, "-m", "liar_ext", "prune", str(dense), *options]
    print("liar", *command[3:], flush=True)
    subprocess.run(command, check=True)


def write_tokens(folder: Path, held_out: Path, out: Path) -> None:
    """Write ids of held-out text by a folder's tokenizer, shape (windows, tokens), unless there."""
    if out.exists():
        return
    from transformers import AutoTokenizer

    from liar_ext.calibration.documents import read_documents
    from liar_ext.calibration.texts import evaluation_sequences

    drawn = evaluation_sequences(
        read_documents(str(held_out)),
        AutoTokenizer.from_pretrained(folder),
        seq_len=TOKENS,
        samples=WINDOWS,
    )
    ids = np.concatenate([batch["input_ids"].numpy() for batch in drawn.batches(1)])
    np.save(out, ids)


def write_task(held_out: Path, folder: Path) -> None:
    """Write a task: which of four continuations is the one of the article, and not of another."""
    script("tests/choice_tasks.py").write_choices(folder, "continuations", _items(held_out))


def _items(held_out: Path) -> Iterator[dict]:
    """Yield questions of 24 words with choices of 8 words, all of as many articles."""
    lines = held_out.read_text(encoding="utf-8").splitlines()
    articles = [json.loads(line)["text"].split()[20:] for line in lines]
    articles = [words for words in articles if len(words) >= 32][:ITEMS]
    for at, words in enumerate(articles):
        others = [articles[(at + step) % len(articles)] for step in range(4)]
        choices = [" ".join(each[24:32]) for each in others]
        right = at % 4  # its place among the choices takes turns
        choices[0], choices[right] = choices[right], choices[0]
        yield {"question": " ".join(words[:24]), "choices": choices, "answer": right}
