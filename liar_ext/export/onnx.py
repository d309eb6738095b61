"""ONNX: encoders and classifiers for onnxruntime, optimum and sentence-transformers.

What is written is a folder that stock tools read::

    OUT/onnx/model.onnx      input_ids, attention_mask[, token_type_ids] or pixel_values
                             → last_hidden_state, or logits; and sentence_embedding where the folder
                             says how to pool
    OUT/config.json, tokenizer, modules.json, 1_Pooling/, ...
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from liar_ext.checkpoint.loading import load_model
from liar_ext.checkpoint.stock_config import LAYER_FIELDS
from liar_ext.errors import InputError, one_line
from liar_ext.export.formats import Exported
from liar_ext.export.onnx_graph import (
    EMBEDDING,
    MOST_IN_ONE_FILE,
    Difference,
    build_graph,
    compare,
    sample_inputs,
    silent,
    write_graph,
)
from liar_ext.export.sentence import Sentence, read_inside, read_sentence
from liar_ext.models.running import inputs_read, predicts_next_token

FILE = Path("onnx", "model.onnx")
PREPROCESSOR = "preprocessor_config.json"
QUANTIZE = ("float32", "int8")
# float32 sums in another order lose some 1e-6; a graph that is wrong loses far more.
MOST_LOST = 1e-4
# Of int8, whose difference on random inputs says little of a task: zeros would be as near as this.
MOST_LOST_BY_INT8 = 1.0
NOT_OF_A_GRAPH = ("auto_map", "liar", "quantization_config", *LAYER_FIELDS)


def export(
    folder: Path, out: Path, *, progress: bool = True, quantize: str = "float32"
) -> Exported:
    """Write a folder with a graph of any number of sequences and tokens, checked by onnxruntime.

    Parameters
    ----------
    folder, out : Path
        A model folder, and the folder to write.
    progress : bool
        Not used: torch shows none.
    quantize : {"float32", "int8"}
        ``int8``: weights of products and embeddings in 8 bits, inputs of products at run time.

    Raises
    ------
    InputError
        If the model is one that generates text, torch or onnxruntime can't express it, its
        sentence-transformers files can't be followed, or the graph's outputs aren't torch's.
    """
    if quantize not in QUANTIZE:
        raise InputError(
            f"export: --quantize of --to onnx must be one of {', '.join(QUANTIZE)}, got "
            f"{quantize!r}"
        )
    sentence, processor = read_sentence(folder), None
    if os.path.lexists(folder / PREPROCESSOR):
        processor = read_inside(folder, PurePosixPath(PREPROCESSOR))
    model, tokenizer = load_model(folder)
    if predicts_next_token(model):
        raise InputError(
            f"export: --to onnx takes encoders and classifiers, got {type(model).__name__}, which "
            "generates text and needs a key-value cache; use --to gguf, or vLLM"
        )
    if len(read := inputs_read(model)) > 1:
        raise InputError(
            f"export: --to onnx takes models of one input, got {type(model).__name__}, which reads "
            f"{' and '.join(read)}; save a part of it as a model of its own"
        )
    if sentence is not None:  # sentence-transformers takes the encoder of whatever was saved
        model = model.base_model
    graph = build_graph(model, sentence)
    path = out / FILE
    path.parent.mkdir(parents=True)
    first = path if quantize == "float32" else path.with_name("float32.onnx")
    write_graph(graph, first)
    found = compare(graph, first)
    if not found.relative <= MOST_LOST:
        raise _wrong(found, MOST_LOST, "")
    notes = [
        f"{FILE}: {', '.join(sample_inputs(model, 1, 1))} to {', '.join(graph.names)}, "
        f"{_size(first) / 1e6:,.1f} MB in float32; onnxruntime's outputs differ from torch's by "
        f"{found.largest:.1e} at most."
    ]
    if first != path:
        notes.append(_to_int8(graph, first, path))
    _write_companions(out, model, tokenizer, sentence, processor)
    notes += _how_to_load(model, tokenizer, sentence)
    return Exported("onnx", (out,), tuple(notes))


def _wrong(found: Difference, most: float, hint: str) -> InputError:
    return InputError(
        f"export: onnxruntime's outputs are not torch's: they differ by {found.largest:.1e}, "
        f"relatively by {found.relative:.1e} where {most:.0e} is allowed; nothing was written"
        f"{hint}"
    )


def _to_int8(graph: nn.Module, first: Path, path: Path) -> str:
    """Write a file with weights in 8 bits, remove the first; return what that changed."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = _size(first)
    try:
        with silent():
            quantize_dynamic(
                first,
                path,
                weight_type=QuantType.QInt8,
                per_channel=True,
                # Seven bits: a sum of two products of eight overflows 16 bits on CPUs without VNNI.
                reduce_range=True,
                use_external_data_format=before > 2 * MOST_IN_ONE_FILE,
            )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # protobuf's, too, where the disk is full and nothing noticed
        raise InputError(
            f"export: onnxruntime can't quantise this graph: {type(error).__name__}: "
            f"{one_line(error)}; free space if the disk is full, or leave --quantize out"
        ) from error
    for file in _files(first):
        file.unlink()
    found = compare(graph, path)
    if not found.relative <= MOST_LOST_BY_INT8:
        raise _wrong(found, MOST_LOST_BY_INT8, "; leave --quantize out")
    return (
        f"int8: {_size(path) / 1e6:,.1f} MB for {before / 1e6:,.1f} MB; greatest difference from "
        f"torch {found.largest:.2g}, relatively {found.relative:.2g}, on random inputs: measure "
        "your own task."
    )


def _files(path: Path) -> list[Path]:
    """Return a graph's file, and that of its weights where it has one."""
    return sorted(path.parent.glob(f"{path.name}*"))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _write_companions(
    out: Path, model: Any, tokenizer: Any, sentence: Sentence | None, processor: Any
) -> None:
    """Write what tools read beside the graph."""
    fields = model.config.to_dict()
    fields = {name: value for name, value in fields.items() if name not in NOT_OF_A_GRAPH}
    fields["architectures"] = [type(model).__name__]
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(out)
        except Exception as error:  # its Rust library raises nothing more special
            raise OSError(f"the tokenizer can't be saved: {one_line(error)}") from error
    if sentence is not None:
        sentence.save(out)
    if processor is not None:
        text = json.dumps(processor, indent=2) + "\n"
        (out / PREPROCESSOR).write_text(text, encoding="utf-8")


def _how_to_load(model: Any, tokenizer: Any, sentence: Sentence | None) -> list[str]:
    """Return sentences for the user."""
    notes = [f"Load with onnxruntime.InferenceSession('OUT/{FILE}'), or with optimum."]
    if sentence is not None:
        notes = [
            f"Load with onnxruntime.InferenceSession('OUT/{FILE}') and ask for {EMBEDDING}, or "
            "with SentenceTransformer('OUT', backend='onnx')."
        ]
    if tokenizer is None and model.main_input_name == "input_ids":
        notes.append("The folder has no tokenizer, so none was written: put one beside the graph.")
    return notes
