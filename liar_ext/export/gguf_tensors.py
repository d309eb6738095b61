"""The tensors of a GGUF file: their names there, and their values as the architecture takes them.

Vectors (norms, biases) and routers stay float32, as llama.cpp expects; other matrices get the type
that is asked for. Names come from the package ``gguf``, but for those of experts: all experts of a
layer are one tensor ``(experts, rows, columns)`` per linear layer, with gate and up apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.export.gguf_architectures import Architecture, Layers, rope_parameters
from liar_ext.models.experts import router_of
from liar_ext.models.running import get_path
from liar_ext.models.sites import sites
from liar_ext.system.errors import InputError

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LARGEST_F16 = 65504.0
GPT2_LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
ROUTER, SHARED_GATE = "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"
HEAD = "output.weight"
# What a router has for each expert, by the names in its module: its rows, and numbers that are
# added to the weights in the choice alone.
ROUTED = {"weight": ROUTER, "e_score_correction_bias": "exp_probs_b.bias"}


@dataclass(frozen=True)
class Written:
    """A tensor as it is written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    type: str  # of FLOATS

    @property
    def info(self) -> tuple[str, tuple[int, ...], np.dtype, int, Any]:
        """What ``GGUFWriter.add_tensor_info`` takes."""
        import gguf

        size = FLOATS[self.type].itemsize * math.prod(self.shape)
        kind = gguf.GGMLQuantizationType[self.type.upper()]
        return self.name, self.shape, np.dtype(np.float32), size, kind

    def data(self) -> np.ndarray:
        """Return the values; InputError is raised if one is out of the type's range."""
        tensor = self.read().detach().cpu()
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
    for name, shape, read in _named(model, architecture, layers):
        whole = len(shape) == 1 or name.endswith(ROUTER)
        yield Written(name, shape, read, "f32" if whole else kind)


Named = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def _named(model: nn.Module, architecture: Architecture, layers: Layers) -> Iterator[Named]:
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, len(layers.heads))
    experts = _experts(model) if architecture.mixture else {}
    factors = rope_factors(model.config, layers.head_dim)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for path, _ in model.named_buffers():
        yield from experts.get(path, ())
    written = set()
    for path, parameter in model.named_parameters():  # a head that shares its weight is not written
        if path in experts:
            yield from experts[path]
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"export: --to gguf: {architecture.name} has no tensor for {path}; use the folder "
                "itself"
            )
        written.add(name)
        turned = architecture.transposed and path.endswith(GPT2_LINEAR)
        shape = tuple(parameter.shape)
        if name.endswith(SHARED_GATE):
            shape = shape[1:]  # of one row, a vector there
        read = _reader(path, parameter.T if turned else parameter, architecture, layers)
        yield name, shape[::-1] if turned else shape, read
    if architecture.head and HEAD not in written:
        weight = model.get_output_embeddings().weight
        yield HEAD, tuple(weight.shape), weight.detach


def _experts(model: nn.Module) -> dict[str, list[Named]]:
    """Return what the parameters of all experts of a layer, and its router, become; by path."""
    found: dict[str, list[Named]] = {}
    for site in sites(model, ("mlp",)):
        if site.expert != 0:
            continue
        wiring, block = site.wiring, f"blk.{site.block}."
        (producer,) = site.producers
        both, down = get_path(model, producer), get_path(model, site.consumer)
        gate, up = both.detach().chunk(2, dim=1)
        found[producer] = [
            (f"{block}ffn_{name}_exps.weight", tuple(half.shape), half.detach)
            for name, half in (("gate", gate), ("up", up))
        ]
        found[site.consumer] = [(f"{block}ffn_down_exps.weight", tuple(down.shape), down.detach)]
        for name, tensor in router_of(model, site).state_dict().items():
            there = ROUTED[name.rpartition(".")[2]]
            shape = tuple(tensor.shape if there == ROUTER else tensor.shape[-1:])
            path = f"{site.path}.{wiring.experts.router}.{name}"
            found[path] = [(block + there, shape, tensor.detach)]
    return found


def _reader(
    path: str, parameter: Tensor, architecture: Architecture, layers: Layers
) -> Callable[[], Tensor]:
    """Return what reads a parameter as the architecture takes it."""
    parts = path.split(".")
    if architecture.interleaved and len(parts) > 2 and parts[-2] in ("q_proj", "k_proj"):
        return lambda: interleave(parameter.detach(), layers.head_dim)
    if architecture.name == "gemma3" and parts[-2].endswith("norm"):
        return lambda: parameter.detach().float() + 1  # which transformers adds in its forward
    if architecture.name == "gptneox" and parts[-2] == "query_key_value":
        heads = parameter.detach().unflatten(0, (-1, 3, layers.head_dim))  # q, k and v of each
        return lambda: heads.transpose(0, 1).flatten(0, 2)  # [q; k; v] of all
    return parameter.detach


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
