"""Tiny models that read images with text, with processors of their own kinds."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VOCAB, tiny

from liar_ext.calibration.image_text import ImageTextReader, read_examples
from liar_ext.calibration.media import evaluation_inputs

PIXELS = 8
TEMPLATE = "user: {}\nassistant: {}\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ 'HOLDER' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Seeing:
    """One kind: what stands for an image in a text, and in how many tokens."""

    placeholder: str
    tokens: int
    special: dict[str, str]  # tokens of the tokenizer by the names that its processor has for them
    fields: dict[str, Any] = field(default_factory=dict)  # of the config
    needs: tuple[str, ...] = ()  # packages of its processor


_VIDEO = ("torchvision",)  # whose processors of videos stand beside those of images
SEEING = {
    "llava": Seeing("<image>", 4, {"image_token": "<image>"}),
    "gemma3": Seeing(
        "<boi>", 4, {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    ),
    "smolvlm": Seeing(
        "<image>",
        1,
        {"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global>"},
        {"scale_factor": 2},
        (*_VIDEO, "num2words"),
    ),
    "qwen3_vl": Seeing(
        "<start><image><end>",
        4,
        {
            **{"image_token": "<image>", "video_token": "<video>"},
            **{"vision_start_token": "<start>", "vision_end_token": "<end>"},
        },
        needs=_VIDEO,
    ),
}


def image_token(name: str) -> int:
    """Return the id that the tokenizer of a kind has for a part of an image."""
    return VOCAB - len(SEEING[name].special)


def seeing_model(name: str, **fields: Any) -> Any:
    """Return a tiny random model of a kind."""
    key = "image_token_index" if name in ("llava", "gemma3") else "image_token_id"
    return tiny(name, **{key: image_token(name)}, **SEEING[name].fields, **fields)


def seeing_inputs(name: str, seed: int = 0) -> dict[str, Any]:
    """Return an image and some tokens after it, in float64, without a processor."""
    generator, tokens = torch.Generator().manual_seed(seed), SEEING[name].tokens
    text = torch.randint(3, 40, (5,), generator=generator)
    ids = torch.cat([torch.full((tokens,), image_token(name)), text])[None]
    pixels = torch.randn(1, 3, PIXELS, PIXELS, dtype=torch.float64, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == image_token(name)).long()
    if name == "smolvlm":
        inputs["pixel_values"] = pixels[None]
    if name == "qwen3_vl":
        patches = torch.randn(4, 96, dtype=torch.float64, generator=generator)
        inputs |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2]])}
        inputs["mm_token_type_ids"] = (ids == image_token(name)).int()
    return inputs


def _tokenizer(name: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_lowercase + string.digits + " .:\n"
    special = SEEING[name].special
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(characters)}
    vocabulary |= {f"[{at}]": at for at in range(len(vocabulary), image_token(name))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    core.add_special_tokens([*special.values()])  # numbered in their order
    marks = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **marks, extra_special_tokens=special)


def seeing_processor(name: str) -> Any:
    """Return the processor of a kind, or skip the test if packages of it are missing."""
    import transformers as library

    for package in SEEING[name].needs:
        pytest.importorskip(package, reason=f"the processor of {name} needs {package}")
    square, tokenizer = {"height": PIXELS, "width": PIXELS}, _tokenizer(name)
    template = {"chat_template": CHAT_TEMPLATE.replace("HOLDER", SEEING[name].placeholder)}
    if name == "llava":
        images = library.CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=square)
        how = {"patch_size": 4, "vision_feature_select_strategy": "default"}
        how["num_additional_image_tokens"] = 1  # of CLIP's class, which the strategy takes off
        return library.LlavaProcessor(images, tokenizer, **how, **template)
    if name == "gemma3":
        images = library.Gemma3ImageProcessorPil(size=square)
        return library.Gemma3Processor(images, tokenizer, image_seq_length=4, **template)
    if name == "smolvlm":
        longest = {"longest_edge": PIXELS}
        how = {"size": longest, "max_image_size": longest, "do_image_splitting": False}
        images = library.SmolVLMImageProcessorPil(**how)
        videos = library.SmolVLMVideoProcessor()
        return library.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=1, **template)
    pixels = PIXELS * PIXELS
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    images = library.Qwen2VLImageProcessorPil(patch_size=4, merge_size=1, size=size)
    videos = library.Qwen3VLVideoProcessor(patch_size=4, merge_size=1)
    return library.Qwen3VLProcessor(images, tokenizer, videos, **template)


def write_examples(folder: Any, count: int, seed: int = 0, lines: int = 1) -> None:
    """Write pictures, and lines with each of them, of every third a chat."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, PIXELS, PIXELS, 3), np.uint8)
    rows = []
    for number, each in enumerate(pixels):
        name = f"{number:02}.png"
        Image.fromarray(each).save(folder / name)
        for line in range(lines):
            said = f"picture {number} of {seed} line {line}"
            content = [{"type": "image"}, {"type": "text", "text": said}]
            chat = {"messages": [{"role": "user", "content": content}]}
            rows.append({"image": name} | (chat if number % 3 == 2 else {"text": said}))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "examples.jsonl").write_text(text)


def read_by(model: Any, name: str, path: Any) -> Any:
    """Return the inputs of a model for all lines of a file."""
    return evaluation_inputs(read_examples(path), ImageTextReader(model, seeing_processor(name)))
