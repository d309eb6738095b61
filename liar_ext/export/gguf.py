"""Write a model folder as a GGUF file, for llama.cpp and what is built on it.

Tensors are converted and written one after the other.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.inspection import read_config
from liar_ext.export import stored_dtype
from liar_ext.export.gguf_architectures import (
    Architecture,
    Layers,
    Mixture,
    architecture_of,
    layers_of,
    rope_parameters,
    sliding_window,
)
from liar_ext.export.gguf_tensors import FLOATS, tensors_of
from liar_ext.export.gguf_tokenizer import add_tokenizer
from liar_ext.export.llama_cpp import LIBRARY, check_type, quantize_file, run_file
from liar_ext.system.errors import InputError

DTYPES = {str(dtype).removeprefix("torch."): kind for kind, dtype in FLOATS.items()}
TOLERANCE = 1e-2  # in nats, of float32 files: sums in another order, Gemma's GELU from a table


def export(
    folder: Path, out: Path, *, quantize: str | None = None, check: bool = True
) -> list[str]:
    """Write ``folder`` as one GGUF file.

    Parameters
    ----------
    folder, out
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
    if kind not in FLOATS:
        check_type(kind)
    model, tokenizer = load_model(folder, stored)
    architecture, layers = architecture_of(model), layers_of(model)
    notes = _notes(model, architecture, layers)
    base = out if kind in FLOATS else out.with_name(f"{out.name}.unquantized")
    own = kind if kind in FLOATS else DTYPES[stored]
    name = folder.name.encode(errors="replace").decode()  # a name on disk may be no UTF-8
    notes += _write(model, tokenizer, architecture, layers, base, own, name)
    if base != out:
        notes += quantize_file(base, out, kind)
        base.unlink()
    if check:
        notes.append(_checked(model, out, kind, architecture.mixture is not None))
    return notes


@torch.no_grad()
def _checked(model: nn.Module, path: Path, kind: str, experts: bool) -> str:
    """Compare ``-log p`` of 31 random tokens, by llama.cpp and by transformers; return a note.

    With experts the median counts: where two nearly tie, rounding sends a token elsewhere.
    """
    if find_spec(LIBRARY) is None:
        return "Not run by llama.cpp, whose library isn't here: pip install llama-cpp-py-sync."
    rows = model.get_input_embeddings().weight.shape[0]
    count = max(2, min(32, model.config.max_position_embeddings))
    ids = torch.randint(rows, (1, count), generator=torch.Generator().manual_seed(0))
    ours = model(ids).logits[0, :-1].double().log_softmax(-1)
    ours = -ours.gather(-1, ids[0, 1:, None])[:, 0].numpy()
    each = np.abs(ours - run_file(path, ids.numpy())["nll"][0])
    difference, middle = float(each.max()), float(np.median(each))
    judged = middle if experts else difference
    if not judged <= (TOLERANCE if kind == "f32" and model.dtype == torch.float32 else np.inf):
        raise InputError(
            f"export: --to gguf: llama.cpp's log-likelihoods differ by up to {difference:.1e} from "
            "those of the folder; use the folder itself"
        )
    more = f", {middle:.1e} in the median" if experts else ""
    return f"Run by llama.cpp: log-likelihoods of tokens differ by up to {difference:.1e}{more}."


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
    share = "ALL" if kind == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{share}_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, model, architecture, layers)
    notes = add_tokenizer(writer, tokenizer, model)
    tensors = list(tensors_of(model, architecture, layers, kind))
    for each in tensors:
        writer.add_tensor_info(*each.info)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tensors:
            writer.write_tensor_data(each.data())
    finally:
        writer.close()
    return notes


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
    if architecture.mixture is not None:
        _add_experts(writer, config, architecture.mixture, layers)
    if architecture.scaled:
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture.name == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(1)
    if architecture.name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture.name == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture.rotary:
        _add_rope(writer, config, architecture, layers.head_dim)


def _add_experts(writer: Any, config: Any, mixture: Mixture, layers: Layers) -> None:
    """Write the sizes of the experts, which are those of the last layer."""
    writer.add_expert_count(layers.experts[-1])
    writer.add_expert_used_count(layers.active[-1])
    if mixture.own_width:
        writer.add_expert_feed_forward_length(layers.channels[-1])
    if mixture.shared == "width":
        writer.add_expert_shared_feed_forward_length(layers.shared[-1])
    elif mixture.shared == "count":
        writer.add_expert_shared_count(layers.shared[-1] // layers.channels[-1])
    if mixture.leading:
        writer.add_leading_dense_block_count(layers.leading)
    if mixture.normalised is None:
        import gguf

        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(bool(config.norm_topk_prob))
        writer.add_expert_weights_scale(float(config.routed_scaling_factor))


def _add_rope(writer: Any, config: Any, architecture: Architecture, head_dim: int) -> None:
    rope = rope_parameters(config)
    scaling, stretch = rope.get("rope_type", "default"), 1.0
    if config.model_type == "hunyuan_v1_moe" and scaling == "dynamic" and rope.get("alpha"):
        # HunYuan's is not dynamic: it stretches the base once for all lengths.
        scaling, stretch = "default", rope["alpha"] ** (head_dim / (head_dim - 2))
    partial = rope.get("partial_rotary_factor", 1.0)
    whole = partial == 1.0 or architecture.partial
    known = [each for each in SCALINGS if each != "llama3" or architecture.factors]
    if scaling not in known or not whole:
        what = f"rope_type {scaling!r}" if whole else f"partial_rotary_factor {partial}"
        raise InputError(
            f"export: --to gguf: rotary embeddings with {what} aren't written; {architecture.name} "
            f"has those with {', '.join(known)} of whole heads; use the folder itself"
        )
    writer.add_rope_dimension_count(int(head_dim * partial))
    writer.add_rope_freq_base(float(rope["rope_theta"]) * stretch)
    if scaling == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
