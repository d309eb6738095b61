"""ONNX: encoders and classifiers for onnxruntime, optimum and sentence-transformers."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.folder import PROCESSOR_FILES
from liar_ext.checkpoint.loading import load_model
from liar_ext.checkpoint.readers import Sentence, read_inside, read_sentence
from liar_ext.checkpoint.saving import save_tokenizer
from liar_ext.checkpoint.stock_config import LAYER_FIELDS
from liar_ext.models.running import draw_inputs, inputs_read, positions_of, predicts_next_token
from liar_ext.system.errors import InputError, refusing

FILE = Path("onnx", "model.onnx")
PREPROCESSOR = PROCESSOR_FILES[0]
QUANTIZE = ("float32", "int8")
# float32 sums in another order lose some 1e-6; a graph that is wrong loses far more.
MOST_LOST = 1e-4
# Of int8, whose difference on random inputs says little of a task: zeros would be as near as this.
MOST_LOST_BY_INT8 = 1.0
NOT_OF_A_GRAPH = ("auto_map", "liar", "quantization_config", *LAYER_FIELDS)
# What a model's forward returns, by the names that transformers and optimum use.
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
EMBEDDING = "sentence_embedding"
# (sequences, tokens): both 1, tokens of one sequence, padding on the right and on the left.
SHAPES = ((1, 1), (1, 7), (3, 1), (2, 16), (5, 11))
# protobuf stops at 2 GiB; of what weights leave, the graph itself takes some megabytes.
MOST_IN_ONE_FILE = 2**31 - 2**26
OPSET = 20
UNFIT = (RuntimeError, ValueError, TypeError, IndexError, KeyError)


def export(folder: Path, out: Path, *, quantize: str = "float32") -> list[str]:
    """Write a folder with a graph of any number of sequences and tokens, checked by onnxruntime.

    ``OUT/onnx/model.onnx`` gives the outputs of the model, and sentence_embedding if the folder
    says how to pool. Beside it lie what stock tools read: config.json, tokenizer, modules.json, ...

    Parameters
    ----------
    folder, out : Path
        A model folder, and the folder to write.
    quantize : {"float32", "int8"}
        ``int8``: weights of products and embeddings in 8 bits, inputs of products at run time.
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
    largest, _ = check_graph(graph, first, MOST_LOST)
    notes = [
        f"{FILE}: {', '.join(sample_inputs(model, 1, 1))} to {', '.join(graph.names)}, "
        f"{_size(first) / 1e6:,.1f} MB in float32; onnxruntime's outputs differ from torch's by "
        f"{largest:.1e} at most."
    ]
    if first != path:
        notes.append(_to_int8(graph, first, path))
    _write_companions(out, model, tokenizer, sentence, processor)
    how = f"Load with onnxruntime.InferenceSession({str(out / FILE)!r})"
    notes.append(f"{how}." if sentence is None else f"{how}, and ask for {EMBEDDING}.")
    if find_spec("optimum") is not None:
        notes.append("optimum reads the folder, too, and so sentence-transformers' backend='onnx'.")
    if tokenizer is None and model.main_input_name == "input_ids":
        notes.append("The folder has no tokenizer, so none was written: put one beside the graph.")
    return notes


def _to_int8(graph: nn.Module, first: Path, path: Path) -> str:
    """Write a file with weights in 8 bits, remove the first; return what that changed."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = _size(first)
    what = "export: onnxruntime can't quantise this graph"
    # Of a full disk protobuf has an error of its own.
    hint = "free space if the disk is full, or leave --quantize out"
    with silent(), refusing(what, hint, Exception, named=True, but=(OSError,)):
        quantize_dynamic(
            first,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Seven bits: a sum of two products of eight overflows 16 bits on CPUs without VNNI.
            reduce_range=True,
            use_external_data_format=before > 2 * MOST_IN_ONE_FILE,
        )
    for file in _files(first):
        file.unlink()
    largest, relative = check_graph(graph, path, MOST_LOST_BY_INT8, "; leave --quantize out")
    return (
        f"int8: {_size(path) / 1e6:,.1f} MB for {before / 1e6:,.1f} MB; greatest difference from "
        f"torch {largest:.2g}, relatively {relative:.2g}, on random inputs: measure "
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
    save_tokenizer(tokenizer, out)
    if sentence is not None:
        sentence.save(out)
    if processor is not None:
        text = json.dumps(processor, indent=2) + "\n"
        (out / PREPROCESSOR).write_text(text, encoding="utf-8")


class Graph(nn.Module):
    """Token ids, pixels or sound to the outputs of a model, in the order of ``names``."""

    def __init__(self, model: nn.Module, names: Sequence[str], sentence: Sentence | None) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.pooling = sentence and sentence.pooling
        self.rest = sentence and sentence.rest

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the model's outputs and, where there is a pooling, the sentence's embedding."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids, "pixel_values": pixel_values}
        inputs |= {"input_values": input_values}
        given = {name: value for name, value in inputs.items() if value is not None}
        result = self.model(**given)
        found = [result[name] for name in self.names if name != EMBEDDING]
        if self.pooling is not None:
            found.append(self.rest(self.pooling(result["last_hidden_state"], attention_mask)))
        return tuple(found)


def build_graph(model: nn.Module, sentence: Sentence | None) -> nn.Module:
    """Return a module whose forward is the graph; refuse outputs that aren't in ``OUTPUTS``."""
    # Explicit products and a softmax: of what torch fuses, sequences that are all padding come out
    # as other numbers elsewhere.
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    inputs = sample_inputs(model, *SHAPES[1])
    with torch.no_grad(), _refusing(type(model).__name__):
        result = model(**inputs)
    names = [name for name in OUTPUTS if name in result]
    # What a task needs ends so; all else are intermediate states.
    if not names or any(key not in names and key.endswith("logits") for key in result):
        raise InputError(
            f"export: --to onnx can't express {type(model).__name__}, whose outputs are "
            f"{', '.join(result)}; export an encoder, or a classifier of texts, tokens or images"
        )
    if not all(result[name].isfinite().all() for name in names):
        raise InputError(
            f"export: the outputs of {type(model).__name__} for random inputs hold NaN or "
            "infinity; look for damaged weights"
        )
    sentence = sentence if "input_ids" in inputs else None
    graph = Graph(model, [*names, *([EMBEDDING] if sentence else [])], sentence).eval()
    with torch.no_grad(), _refusing("modules.json, after the encoder"):
        graph(**inputs)
    return graph


def sample_inputs(model: nn.Module, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs; of texts all but the first are padded, on the right and on the left."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name in ("pixel_values", "input_values"):
        return draw_inputs(model, batch, tokens, generator)
    config, rows = model.config, model.get_input_embeddings().weight.shape[0]
    pad = config.pad_token_id if config.pad_token_id in range(rows) else 0
    tokens = max(1, min(tokens, positions_of(model) or tokens))
    ids = torch.randint(rows, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        left = (row - 1) % max(tokens // 2, 1)
        right = tokens // 2 if row % 2 else 0
        mask[row, : left * (row % 2 == 0)] = 0
        mask[row, tokens - min(right, tokens - 1) :] = 0
    ids = torch.where(ids == pad, (pad + 1) % rows, ids).where(mask.bool(), pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    arguments = inspect.signature(model.forward).parameters
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in arguments:
        inputs["token_type_ids"] = torch.randint(2, ids.shape, generator=generator) * mask
    return inputs


def write_graph(graph: nn.Module, path: Path) -> None:
    """Write a graph with any number of sequences and tokens."""
    inputs = sample_inputs(graph.model, 2, 7)
    axes = {0: "batch"} if "pixel_values" in inputs else {0: "batch", 1: "tokens"}
    size = sum(each.nbytes for each in graph.state_dict().values())
    with torch.no_grad(), silent(), _refusing(type(graph.model).__name__):
        torch.onnx.export(
            graph,
            kwargs=inputs,
            f=path,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(graph.names),
            dynamic_shapes=dict.fromkeys(inputs, axes),
            external_data=size > MOST_IN_ONE_FILE,
            verbose=False,
        )


def check_graph(graph: nn.Module, path: Path, most: float, hint: str = "") -> tuple[float, float]:
    """Return how far a file is from torch, over all of ``SHAPES``; refuse one that is too far.

    Returned are ``max |y − ŷ|`` over all outputs, infinite if one isn't finite or of another
    shape, and, of the output where it is largest, ``|y − ŷ|₂ / |y|₂``, which is at most ``most``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    largest = relative = 0.0
    with _refusing("what was written, by onnxruntime", Exception):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for seed, shape in enumerate(SHAPES):
            inputs = sample_inputs(graph.model, *shape, seed=seed)
            with torch.no_grad():
                expected = graph(**inputs)
            fed = {name: each.numpy() for name, each in inputs.items()}
            got = session.run(list(graph.names), fed)
            for ours, theirs in zip(expected, map(torch.from_numpy, got), strict=True):
                gap = norm = math.inf
                if ours.shape == theirs.shape and (ours - theirs).isfinite().all():
                    gap = float((ours - theirs).abs().max())
                    norm = float((ours - theirs).norm()) / (float(ours.norm()) or 1.0)
                largest, relative = max(largest, gap), max(relative, norm)
    if not relative <= most:
        raise InputError(
            f"export: onnxruntime's outputs are not torch's: they differ by {largest:.1e}, "
            f"relatively by {relative:.1e} where {most:.0e} is allowed; nothing was written{hint}"
        )
    return largest, relative


@contextmanager
def silent() -> Iterator[None]:
    """Keep back warnings and logs of libraries that are about their own insides."""
    root, null = logging.getLogger(), logging.NullHandler()
    before = root.manager.disable
    root.addHandler(null)  # else a warning to the root logger gives it a handler for good
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.removeHandler(null)


def _refusing(what: str, *kinds: type[BaseException]) -> AbstractContextManager[None]:
    """Turn what a library raises at a model that it can't take into one line."""
    what, hint = f"export: --to onnx can't express {what}", "use the folder with transformers"
    return refusing(what, hint, *(kinds or UNFIT), named=True, but=(OSError,))
