"""Write a model folder as a GGUF file, for llama.cpp and what is built on it.

Tensors are converted and written one after the other. Vectors (norms, biases) stay float32, as
llama.cpp expects; matrices get the type that is asked for. Names come from the package ``gguf``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.inspection import read_config
from liar_ext.errors import InputError
from liar_ext.export import Exported, stored_dtype
from liar_ext.export.gguf_architectures import (
    Architecture,
    Layers,
    architecture_of,
    layers_of,
    rope_parameters,
    sliding_window,
)
from liar_ext.export.gguf_tokenizer import add_tokenizer
from liar_ext.export.llama_cpp import LIBRARY, check_type, quantize_file, run_file

DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BYTES = {"f32": 4, "f16": 2, "bf16": 2}
LARGEST_F16 = 65504.0
GPT2_LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
TOLERANCE = 1e-2  # in nats, of float32 files: sums in another order, Gemma's GELU from a table


def export(
    folder: Path,
    out: Path,
    *,
    progress: bool = True,
    quantize: str | None = None,
    check: bool = True,
) -> Exported:
    """Write ``folder`` as one GGUF file.

    Parameters
    ----------
    folder, out, progress
        As :mod:`liar_ext.export` says.
    quantize : str, optional
        Type of the matrices: ``f32``, ``f16``, ``bf16``, or one of llama.cpp's quantiser, such as
        ``q8_0`` or ``q4_k_m``, which needs its library. By default that of the weights.
    check : bool
        Run the file by llama.cpp, where its library is installed, and compare with the folder.

    Raises
    ------
    InputError
        If no architecture of llama.cpp runs the model, its tokenizer is of a kind that llama.cpp
        lacks, a weight is out of the type's range, or llama.cpp computes something else.
    """
    fields = read_config(folder, "export")
    stored = stored_dtype(fields)
    stored = stored if stored in DTYPES else "float32"
    kind = (quantize or DTYPES[stored]).lower()
    if kind not in BYTES:
        check_type(kind)
    model, tokenizer = load_model(folder, stored)
    architecture, layers = architecture_of(model), layers_of(model)
    notes = _notes(model, architecture, layers)
    base = out if kind in BYTES else out.with_name(f"{out.name}.unquantized")
    own = kind if kind in BYTES else DTYPES[stored]
    name = folder.name.encode(errors="replace").decode()  # a name on disk may be no UTF-8
    notes += _write(model, tokenizer, architecture, layers, base, own, name)
    if base != out:
        notes += quantize_file(base, out, kind)
        base.unlink()
    if check:
        notes.append(_checked(model, out, kind))
    return Exported("gguf", (out,), tuple(notes), out.stat().st_size)


@torch.no_grad()
def _checked(model: nn.Module, path: Path, kind: str) -> str:
    """Compare ``-log p`` of 31 random tokens, by llama.cpp and by transformers; return a note."""
    if find_spec(LIBRARY) is None:
        return "Not run by llama.cpp, whose library isn't here: pip install llama-cpp-py-sync."
    rows = model.get_input_embeddings().weight.shape[0]
    count = max(2, min(32, model.config.max_position_embeddings))
    ids = torch.randint(rows, (1, count), generator=torch.Generator().manual_seed(0))
    ours = model(ids).logits[0, :-1].double().log_softmax(-1)
    ours = -ours.gather(-1, ids[0, 1:, None])[:, 0].numpy()
    difference = float(np.abs(ours - run_file(path, ids.numpy())["nll"][0]).max())
    if not difference <= (TOLERANCE if kind == "f32" and model.dtype == torch.float32 else np.inf):
        raise InputError(
            f"export: --to gguf: llama.cpp's log-likelihoods differ by up to {difference:.1e} from "
            "those of the folder; use the folder itself"
        )
    return f"Run by llama.cpp: log-likelihoods of tokens differ by up to {difference:.1e}."


def _notes(model: nn.Module, architecture: Architecture, layers: Layers) -> list[str]:
    instead = f", whose layers may differ in size, instead of {model.config.model_type}"
    how = f"Architecture {architecture.name}{'' if layers.equal else instead}: llama-cli -m FILE."
    window = sliding_window(model.config)
    if window is None or architecture.name == "gemma3":
        return [how]
    return [
        how,
        f"llama.cpp attends to all tokens here, transformers to the last {window}: outputs differ "
        "in longer sequences.",
    ]


def _write(
    model: nn.Module,
    tokenizer: Any,
    architecture: Architecture,
    layers: Layers,
    out: Path,
    kind: str,
    name: str,
) -> list[str]:
    """Write the file; return what the user should know of its tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(out, architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    types = gguf.LlamaFileType
    file_types = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16}
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, model, architecture, layers)
    notes = add_tokenizer(writer, tokenizer, model)
    tensors = list(_tensors(model, architecture, layers))
    for each, shape, _ in tensors:
        own = kind if len(shape) > 1 else "f32"
        dtype = np.dtype(np.float16 if own == "f16" else np.float32)
        raw = gguf.GGMLQuantizationType.BF16 if own == "bf16" else None
        writer.add_tensor_info(each, shape, dtype, BYTES[own] * math.prod(shape), raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each, shape, read in tensors:
            writer.write_tensor_data(_as_type(read(), kind if len(shape) > 1 else "f32", each))
    finally:
        writer.close()
    return notes


Read = Callable[[], Tensor]


def _tensors(
    model: nn.Module, architecture: Architecture, layers: Layers
) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """Yield name, shape, and what reads the tensor; in the order of the file."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, len(layers.heads))
    factors = rope_factors(model.config, layers.head_dim)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for path, parameter in model.named_parameters():  # a head that shares its weight is not written
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"export: --to gguf: {architecture.name} has no tensor for {path}; use the folder "
                "itself"
            )
        turned = architecture.transposed and path.endswith(GPT2_LINEAR)
        shape = tuple(parameter.shape)
        read = _reader(path, parameter.T if turned else parameter, architecture, layers)
        yield name, shape[::-1] if turned else shape, read


def _reader(path: str, parameter: Tensor, architecture: Architecture, layers: Layers) -> Read:
    """Return what reads a parameter as the architecture takes it."""
    parts = path.split(".")
    if architecture.interleaved and len(parts) > 2 and parts[-2] in ("q_proj", "k_proj"):
        return lambda: interleave(parameter.detach(), layers.head_dim)
    if architecture.name == "gemma3" and parts[-2].endswith("norm"):
        return lambda: parameter.detach().float() + 1  # which transformers adds in its forward
    if architecture.name == "gptneox" and parts[-2] == "query_key_value":
        return lambda: _stacked(parameter.detach(), layers.head_dim)
    return parameter.detach


def _stacked(rows: Tensor, head_dim: int) -> Tensor:
    """Return rows [q; k; v] of all heads, of rows that are q, k and v head by head."""
    return rows.reshape(-1, 3, head_dim, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of q or k so that pairs (i, i + d/2) of each head become (2i, 2i + 1)."""
    heads = rows.shape[0] // head_dim
    halves = rows.reshape(heads, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _as_type(tensor: Tensor, kind: str, name: str) -> np.ndarray:
    """Return a tensor as an array of a type's bytes."""
    tensor = tensor.detach().cpu()
    if kind == "bf16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if kind == "f16":
        largest = float(tensor.float().abs().max())
        if not largest <= LARGEST_F16:
            raise InputError(
                f"export: --to gguf: {name} has values up to {largest:.3g}, over those of f16; "
                "give --quantize bf16 or f32"
            )
    return tensor.to(torch.float16 if kind == "f16" else torch.float32).contiguous().numpy()


# Scaling of rotary embeddings that llama.cpp computes as transformers does.
SCALINGS = ("default", "linear", "llama3")


def add_sizes(writer: Any, model: nn.Module, architecture: Architecture, layers: Layers) -> None:
    """Write the sizes; one number where all layers have it, else one per layer."""
    config = model.config

    def per_layer(sizes: tuple[int, ...]) -> int | list[int]:
        return list(sizes) if architecture.per_layer else sizes[0]

    writer.add_block_count(len(layers.heads))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(model.get_input_embeddings().weight.shape[1])
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_feed_forward_length(per_layer(layers.channels))
    writer.add_head_count(per_layer(layers.heads))
    writer.add_head_count_kv(per_layer(layers.kv_heads))
    writer.add_key_length(layers.head_dim)
    writer.add_value_length(layers.head_dim)
    if architecture.rms_norm:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        name = "layer_norm_epsilon" if hasattr(config, "layer_norm_epsilon") else "layer_norm_eps"
        writer.add_layer_norm_eps(getattr(config, name))
    if architecture.name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture.name == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture.rotary:
        _add_rope(writer, config, architecture, layers.head_dim)


def _add_rope(writer: Any, config: Any, architecture: Architecture, head_dim: int) -> None:
    rope = rope_parameters(config)
    scaling = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", 1.0)
    whole = partial == 1.0 or architecture.partial
    if scaling not in SCALINGS or not whole:
        what = f"rope_type {scaling!r}" if whole else f"partial_rotary_factor {partial}"
        raise InputError(
            f"export: --to gguf: rotary embeddings with {what} aren't written; those with "
            f"{', '.join(SCALINGS)} of whole heads are; use the folder itself"
        )
    writer.add_rope_dimension_count(int(head_dim * partial))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if scaling == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by, (head_dim / 2,): Llama 3 alone.

    Frequencies with a wavelength beyond the original context are divided by ``factor``, those with
    a short one by 1, with a linear passage (in the number of turns) between the two.
    """
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** steps
    turns = float(rope["original_max_position_embeddings"]) / wavelength
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / float(rope["factor"]) + share)).float()
