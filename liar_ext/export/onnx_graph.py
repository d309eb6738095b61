"""A model as an ONNX graph, and what onnxruntime computes of it beside torch."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError, one_line
from liar_ext.export.sentence import Sentence

# What a model's forward returns, by the names that transformers and optimum use.
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
EMBEDDING = "sentence_embedding"
# (sequences, tokens): both 1, tokens of one sequence, padding on the right and on the left.
SHAPES = ((1, 1), (1, 7), (3, 1), (2, 16), (5, 11))
# protobuf stops at 2 GiB; of what weights leave, the graph itself takes some megabytes.
MOST_IN_ONE_FILE = 2**31 - 2**26
OPSET = 20
UNFIT = (RuntimeError, ValueError, TypeError, IndexError, KeyError)


class TextGraph(nn.Module):
    """Token ids to the outputs of a model, in the order of ``names``."""

    def __init__(self, model: nn.Module, names: Sequence[str], sentence: Sentence | None) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.pooling = sentence and sentence.pooling
        self.rest = sentence and sentence.rest

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the model's outputs and, where there is a pooling, the sentence's embedding."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        result = self.model(**inputs)
        found = [result[name] for name in self.names if name != EMBEDDING]
        if self.pooling is not None:
            found.append(self.rest(self.pooling(result["last_hidden_state"], attention_mask)))
        return tuple(found)


class ImageGraph(nn.Module):
    """Pixels to the outputs of a model, in the order of ``names``."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the model's outputs."""
        result = self.model(pixel_values=pixel_values)
        return tuple(result[name] for name in self.names)


@dataclass(frozen=True)
class Difference:
    """How far a graph is from torch, over all of :data:`SHAPES`.

    Parameters
    ----------
    largest : float
        ``max |y − ŷ|`` over all outputs; infinite where one isn't finite or has another shape.
    relative : float
        Of the output where it is largest, ``|y − ŷ|₂ / |y|₂``.
    """

    largest: float
    relative: float


def build_graph(model: nn.Module, sentence: Sentence | None) -> nn.Module:
    """Return a module whose forward is the graph.

    Raises
    ------
    InputError
        If the model's outputs have none of the names that stand in :data:`OUTPUTS`, or what
        follows the encoder doesn't take them.
    """
    # Explicit products and a softmax: of what torch fuses, sequences that are all padding come out
    # as other numbers elsewhere.
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    inputs = sample_inputs(model, *SHAPES[1])
    with torch.no_grad(), _refusing(type(model).__name__):
        result = model(**inputs)
    names = [name for name in OUTPUTS if name in result]
    if not names or any(key not in names and _is_result(key) for key in result):
        raise InputError(
            f"export: --to onnx can't express {type(model).__name__}, whose outputs are "
            f"{', '.join(result)}; export an encoder, or a classifier of texts, tokens or images"
        )
    if not all(result[name].isfinite().all() for name in names):
        raise InputError(
            f"export: the outputs of {type(model).__name__} for random inputs hold NaN or "
            "infinity; look for damaged weights"
        )
    if model.main_input_name == "pixel_values":
        return ImageGraph(model, names).eval()
    graph = TextGraph(model, [*names, *([EMBEDDING] if sentence else [])], sentence).eval()
    with torch.no_grad(), _refusing("modules.json, after the encoder"):
        graph(**inputs)
    return graph


def _is_result(name: str) -> bool:
    """Tell whether an output is one that a task needs, and not one of intermediate states."""
    return name.endswith("logits")


def sample_inputs(model: nn.Module, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs; of texts all but the first are padded, on the right and on the left."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    rows = model.get_input_embeddings().weight.shape[0]
    pad = config.pad_token_id if config.pad_token_id in range(rows) else 0
    # RoBERTa counts positions from beyond its padding token.
    longest = getattr(config, "max_position_embeddings", tokens + pad + 1) - pad - 1
    tokens = max(1, min(tokens, longest))
    ids = torch.randint(rows, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        left = (row - 1) % max(tokens // 2, 1)
        right = tokens // 2 if row % 2 else 0
        mask[row, : left * (row % 2 == 0)] = 0
        mask[row, tokens - min(right, tokens - 1) :] = 0
    ids = torch.where(ids == pad, (pad + 1) % rows, ids).where(mask.bool(), pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in _arguments(model):
        inputs["token_type_ids"] = torch.randint(2, ids.shape, generator=generator) * mask
    return inputs


def write_graph(graph: nn.Module, path: Path) -> None:
    """Write a graph with any number of sequences and tokens.

    Raises
    ------
    InputError
        If torch can't export it.
    """
    inputs = sample_inputs(graph.model, 2, 7)
    axes = {0: "batch"} if "pixel_values" in inputs else {0: "batch", 1: "tokens"}
    size = sum(each.numel() * each.element_size() for each in graph.state_dict().values())
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


def compare(graph: nn.Module, path: Path) -> Difference:
    """Return how far a file is from torch, in a fresh session of onnxruntime.

    Raises
    ------
    InputError
        If onnxruntime can't run it, or the file takes or gives other things than the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    largest = relative = 0.0
    with _refusing("what was written, by onnxruntime", Exception):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_outputs()]
        taken = {each.name for each in session.get_inputs()}
        for seed, shape in enumerate(SHAPES):
            inputs = sample_inputs(graph.model, *shape, seed=seed)
            if taken != set(inputs) or names != list(graph.names):
                raise ValueError(f"it takes {', '.join(taken)} and gives {', '.join(names)}")
            with torch.no_grad():
                expected = graph(**inputs)
            got = session.run(None, {name: each.numpy() for name, each in inputs.items()})
            for ours, theirs in zip(expected, map(torch.from_numpy, got), strict=True):
                if ours.shape != theirs.shape or not theirs.isfinite().all():
                    return Difference(math.inf, math.inf)
                largest = max(largest, float((ours - theirs).abs().max()))
                norm = float(ours.norm()) or 1.0
                relative = max(relative, float((ours - theirs).norm()) / norm)
    return Difference(largest, relative)


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


@contextmanager
def _refusing(what: str, kinds: Any = UNFIT) -> Iterator[None]:
    """Turn what a library raises at a model that it can't take into one line."""
    try:
        yield
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        raise InputError(
            f"export: --to onnx can't express {what}: {type(error).__name__}: {one_line(error)}; "
            "use the folder with transformers"
        ) from error


def _arguments(model: Any) -> Any:
    return inspect.signature(model.forward).parameters
