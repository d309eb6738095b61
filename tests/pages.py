"""Runs the blocks of a page of the docs, in order, on tiny models.

``python`` and ``console`` blocks run in the tests; ``py`` blocks are for an environment of its own,
where ``python tests/pages.py PAGE`` runs all of a page. Of a console block every line after ``$ ``
is a command, and the lines below it are what it prints: numbers and sizes may be others, ``...``
stands for any lines.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<!\w)[-−]?\d[\d,.]*(?:e[+-]?\d+)?(?<![,.])(?: [KMG]i?B)?")
HOME = "/home/me"  # where the pages are read, as they tell it
DECODER = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's kernels for CPUs ask for as many
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
}
TEXT_WORDS = "the model keeps a few heads and most of its channels so that it is smaller".split()


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page where the text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[2], textwrap.dedent(match[3]), text.count("\n", 0, match.start(3)))
        for match in FENCE.finditer(text)
    ]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a console block, each with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            assert found, f"a console block begins with a command, not with {line!r}"
            found[-1][1].append(line)
    assert found, "a console block without a command"
    return found


def pattern(line: str) -> str:
    """Return what a printed line looks like, whatever its numbers and blanks are."""
    return " ".join(NUMBER.sub("#", line).split())


def check_printed(command: str, shown: list[str], printed: str) -> None:
    """Raise AssertionError unless the lines that the page shows were printed, in their order."""
    printed = printed.replace(os.getcwd(), HOME)
    rest = [pattern(line) for line in printed.splitlines()]
    for line in shown:
        if line.strip() == "...":
            continue
        assert pattern(line) in rest, f"{command}: no line like {line!r} in\n{printed}"
        rest = rest[rest.index(pattern(line)) + 1 :]


def run_command(command: str) -> str:
    """Run a command of a console block, ``liar`` in this process; return what it prints."""
    words = shlex.split(command, comments=True)
    if words[0] == "liar":
        from liar_ext.cli.main import main

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = main(words[1:])
        assert code == 0, f"{command}: exit code {code}"
        return printed.getvalue()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


def run(page: Path, languages: tuple[str, ...] = ("python", "console")) -> dict[str, Any]:
    """Run the blocks of a page in the current folder; return the names that Python defined."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.language not in languages:
            continue
        if block.language == "console":
            for command, shown in commands(block.text):
                check_printed(command, shown, run_command(command))
        else:
            code = "\n" * block.line + block.text
            exec(compile(code, str(page), "exec"), names)
    return names


def byte_level(texts: list[str], **settings: Any):
    """Return a tokenizer like GPT-2's, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        **settings,
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    return fast


def documents(count: int, seed: int) -> list[str]:
    """Return texts of random words, each of its own."""
    import random

    draw = random.Random(seed)
    return [
        f"Text {seed}-{i}. " + " ".join(draw.choices([*TEXT_WORDS, f"n{seed}x{i}"], k=400))
        for i in range(count)
    ]


def prepare(folder: Path) -> None:
    """Write what pages begin with: ``model`` and ``encoder``, tiny and random, and texts."""
    from tiny import tiny

    texts = {"calibration.jsonl": documents(60, 1), "held_out.jsonl": documents(14, 2)}
    for name, each in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in each]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    tokenizer = byte_level(texts["calibration.jsonl"], model_max_length=1024)
    model = tiny("llama", vocab_size=len(tokenizer), **DECODER)
    encoder = tiny(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=512,
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    encoder.base_model.save_pretrained(folder / "encoder")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = byte_level(
        texts["calibration.jsonl"], model_max_length=512, model_input_names=names
    )
    tokenizer.save_pretrained(folder / "encoder")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    chain = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "encoder" / "modules.json").write_text(json.dumps(chain))
    (folder / "encoder" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "encoder" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with contextlib.suppress(ImportError):
        prepare_files(folder, tokenizer)
    with contextlib.suppress(ImportError):
        prepare_pipeline(folder)


def prepare_files(folder: Path, tokenizer: Any) -> None:
    """Write what pages on speech and vision begin with; its packages aren't everywhere."""
    import numpy as np
    import soundfile
    from PIL import Image
    from tiny import tiny
    from transformers import ViTImageProcessorPil, WhisperFeatureExtractor

    whisper = tiny("whisper", vocab_size=len(tokenizer))
    whisper.generation_config.max_length = 8
    whisper.save_pretrained(folder / "whisper")
    tokenizer.save_pretrained(folder / "whisper")
    features = {"feature_size": 8, "hop_length": 1333, "chunk_length": 1}
    WhisperFeatureExtractor(**features).save_pretrained(folder / "whisper")
    tiny("dinov2").save_pretrained(folder / "dinov2")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "dinov2")
    draw = np.random.default_rng(0)
    for name, count in (("recordings", 8), ("held_out_recordings", 3)):
        (folder / name).mkdir()
        for number in range(count):
            wave = folder / name / f"{number}.wav"
            soundfile.write(wave, draw.uniform(-0.1, 0.1, 8000), 16_000)
            wave.with_suffix(".txt").write_text("what is said here\n")
    for name, count in (("pictures", 20), ("held_out_pictures", 14)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    prepare_examples(folder)


def prepare_pipeline(folder: Path) -> None:
    """Write what the page on diffusion transformers begins with: a tiny DiT pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    heads = {"num_attention_heads": 4, "attention_head_dim": 8, "norm_num_groups": 4}
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8}
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, **kinds
    )
    transformer = DiTTransformer2DModel(**heads, **sizes)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder / "dit")


def prepare_examples(folder: Path) -> None:
    """Write what the page on image-text models begins with: a tiny LLaVA, and lines with images."""
    from seeing import seeing_model, seeing_processor

    seeing_model("llava").save_pretrained(folder / "llava")
    seeing_processor("llava").save_pretrained(folder / "llava")
    for name, count in (("pictures", 20), ("held_out_pictures", 14)):
        rows = [
            {"image": f"{name}/{at}.png", "text": f"picture {at} of many"} for at in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name.replace('pictures', 'pairs')}.jsonl").write_text(lines)


def main(page: str) -> None:
    """Run all blocks of a page in a temporary folder, ``py`` blocks included."""
    path = Path(page).resolve()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        os.chdir(folder)
        run(path, ("python", "console", "py"))
    count = len([block for block in blocks(path) if block.language in ("python", "console", "py")])
    print(f"{page}: {count} blocks ran")


if __name__ == "__main__":
    main(sys.argv[1])
