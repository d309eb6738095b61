"""Write a model folder as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.checkpoint import load_model
from liar_ext.checkpoint.inspection import read_config
from liar_ext.export import stored_dtype
from liar_ext.export.gguf_architectures import (
    Architecture,
    Layers,
    Mixture,
    architecture_of,
    rope_parameters,
    sliding_window,
)
from liar_ext.export.gguf_tokenizer import add_tokenizer
from liar_ext.export.llama_cpp import LIBRARY, ROUTER, check_type, quantize_file, run_file
from liar_ext.models.layers import get_path
from liar_ext.models.sites import sites
from liar_ext.models.whole import router_of
from liar_ext.system.errors import InputError, refusing

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {str(dtype).removeprefix("torch."): kind for kind, dtype in FLOATS.items()}
TOLERANCE = 1e-2  # in nats, of float32 files: sums in another order, Gemma's GELU from a table
LARGEST_F16 = 65504.0
# Scaling of rotary embeddings that llama.cpp computes as transformers does.
SCALINGS = ("default", "linear", "llama3")
GPT2_LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SHARED_GATE, HEAD = "ffn_gate_inp_shexp.weight", "output.weight"
# What a router has for each expert, by the names in its module: its rows, and numbers that are
# added to the weights in the choice alone.
ROUTED = {"weight": ROUTER, "e_score_correction_bias": "exp_probs_b.bias"}


def export(
    folder: Path, out: Path, *, quantize: str | None = None, check: bool = True
) -> list[str]:
    """Write ``folder`` as one GGUF file.

    Parameters
    ----------
    folder, out : Path
        The model folder, and the file to write.
    quantize : str, optional
        Type of the matrices: ``f32``, ``f16``, ``bf16``, or one of llama.cpp's quantiser, such as
        ``q8_0`` or ``q4_k_m``, which needs its library. By default that of the weights.
    check : bool
        Run the file by llama.cpp, where its library is installed, and compare with the folder.
    """
    import gguf

    stored = stored_dtype(read_config(folder, "export"))
    stored = stored if stored in DTYPES else "float32"
    kind = str(quantize or DTYPES[stored]).lower()
    if kind not in FLOATS:
        check_type(kind)
    model, tokenizer = load_model(folder, stored)
    architecture, layers = architecture_of(model)
    notes = _notes(model, architecture, layers)
    base = out if kind in FLOATS else out.with_name(f"{out.name}.unquantized")
    writer = gguf.GGUFWriter(base, architecture.name)
    writer.add_type("model")
    # A name on disk may be no UTF-8.
    writer.add_name(folder.name.encode(errors="replace").decode())
    own = kind if kind in FLOATS else DTYPES[stored]
    share = "ALL" if own == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{share}_{own.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, model, architecture, layers)
    notes += add_tokenizer(writer, tokenizer, model)
    _write(writer, list(tensors_of(model, architecture, layers, own)))
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
    notes = [
        f"Architecture {architecture.name}{'' if layers.equal else instead}: llama-cli -m FILE."
    ]
    window = sliding_window(model.config)
    if window is not None and architecture.name != "gemma3":
        notes.append(
            f"llama.cpp attends to all tokens here, transformers to the last {window}: outputs "
            "differ in longer sequences."
        )
    return notes


def _write(writer: Any, tensors: list[Written]) -> None:
    """Write the file: its head, and the tensors as they are converted."""
    for each in tensors:
        each.announce(writer)
    try:
        writer.write_header_to_file()
        what = "export: --to gguf: a number of config.json is out of the range of its type"
        with refusing(what, "copy the folder again", OverflowError, struct.error):
            writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tensors:
            writer.write_tensor_data(each.data())
    finally:
        writer.close()


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


@dataclass(frozen=True)
class Written:
    """A tensor of the file: one of the model, or ``change`` of it, which has the same shape."""

    name: str
    tensor: Tensor
    type: str  # of FLOATS
    change: Callable[[Tensor], Tensor] | None = None

    def announce(self, writer: Any) -> None:
        """Write name, shape and type into the head of the file."""
        import gguf

        size = FLOATS[self.type].itemsize * self.tensor.numel()
        kind = gguf.GGMLQuantizationType[self.type.upper()]
        writer.add_tensor_info(self.name, self.tensor.shape, np.dtype(np.float32), size, kind)

    def data(self) -> np.ndarray:
        """Return the values; refuse one that is out of the type's range."""
        tensor = (self.tensor if self.change is None else self.change(self.tensor)).cpu()
        largest = float(tensor.float().abs().max()) if self.type == "f16" else 0.0
        if not largest <= LARGEST_F16:
            raise InputError(
                f"export: --to gguf: {self.name} has values up to {largest:.3g}, over those of "
                "f16; give --quantize bf16 or f32"
            )
        values = tensor.to(FLOATS[self.type]).contiguous()
        return (values.view(torch.int16) if self.type == "bf16" else values).numpy()


def tensors_of(
    model: nn.Module, architecture: Architecture, layers: Layers, kind: str
) -> Iterator[Written]:
    """Yield the tensors of a model in the order of the file, matrices in the type ``kind``."""
    import gguf

    def written(name: str, tensor: Tensor, *change: Any) -> Written:
        # llama.cpp expects vectors (norms, biases) and routers in float32.
        whole = tensor.ndim == 1 or name.endswith(ROUTER)
        return Written(name, tensor.detach(), "f32" if whole else kind, *change)

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, len(layers.heads))
    experts = _experts(model) if architecture.mixture else {}
    factors = rope_factors(model.config, layers.head_dim)
    if factors is not None:
        yield written("rope_freqs.weight", factors)
    for path, _ in model.named_buffers():
        yield from (written(*each) for each in experts.get(path, ()))
    found = set()
    for path, parameter in model.named_parameters():  # a head that shares its weight is not written
        if path in experts:
            yield from (written(*each) for each in experts[path])
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"export: --to gguf: {architecture.name} has no tensor for {path}; use the folder "
                "itself"
            )
        found.add(name)
        tensor = parameter
        if architecture.transposed and path.endswith(GPT2_LINEAR):
            tensor = parameter.T
        elif name.endswith(SHARED_GATE):
            tensor = parameter[0]  # the only row is a vector there
        yield written(name, tensor, _change(path, architecture, layers.head_dim))
    if architecture.head and HEAD not in found:
        yield written(HEAD, model.get_output_embeddings().weight)


def _experts(model: nn.Module) -> dict[str, list[tuple[str, Tensor]]]:
    """Return what the parameters of all experts of a layer, and its router, become; by path."""
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for site in sites(model, ("mlp",)):
        if site.expert != 0:
            continue
        block, (producer,) = f"blk.{site.block}.", site.producers
        gate, up = get_path(model, producer).chunk(2, dim=1)  # (experts, rows, columns) each
        found[producer] = [
            (f"{block}ffn_gate_exps.weight", gate),
            (f"{block}ffn_up_exps.weight", up),
        ]
        down = get_path(model, site.consumer)
        found[site.consumer] = [(f"{block}ffn_down_exps.weight", down)]
        for name, tensor in router_of(model, site).state_dict().items():
            there = ROUTED[name.rpartition(".")[2]]
            path = f"{site.path}.{site.wiring.experts.router}.{name}"
            found[path] = [(block + there, tensor if there == ROUTER else tensor.flatten())]
    return found


def _change(
    path: str, architecture: Architecture, head_dim: int
) -> Callable[[Tensor], Tensor] | None:
    """Return what makes of a parameter the one that the architecture takes, if it is another."""
    owner = path.split(".")[-2]
    if architecture.interleaved and owner in ("q_proj", "k_proj"):
        return lambda rows: interleave(rows, head_dim)
    if architecture.name == "gemma3" and owner.endswith("norm"):
        return lambda weight: weight.float() + 1  # which transformers adds in its forward
    if architecture.name == "gptneox" and owner == "query_key_value":  # q, k and v of each head
        return lambda rows: rows.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
    return None


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of q or k so that pairs (i, i + d/2) of each head become (2i, 2i + 1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


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
