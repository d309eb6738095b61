"""Which architecture of llama.cpp runs a model, and what none of them can.

An architecture sizes every layer like the first one, except ``deci``, whose head counts and MLP
sizes are arrays. It takes the place of ``llama``, and both take the place of ``qwen2``, which can't
have fewer heads, with the rows of q and k in Llama's order: all are the same computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from liar_ext.checkpoint.stock_config import auto_classes
from liar_ext.errors import InputError
from liar_ext.models.running import block_config, predicts_next_token
from liar_ext.models.sites import family_of, sites

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ALL = QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Architecture:
    """A row of the table of architectures.

    Parameters
    ----------
    name : str
        Its name in llama.cpp and in the package ``gguf``.
    interleaved : bool
        Rotary embeddings turn neighbouring features, (0, 1), (2, 3), ...: the rows of q and k are
        reordered. Otherwise, as in transformers, they turn halves, (0, d/2), (1, d/2 + 1), ....
    biases : frozenset of str
        Layers of a block that may have a bias.
    per_layer : bool
        Sizes may differ by layer.
    square : bool
        The heads together must have as many features as the residual stream.
    activation : str
        Of the MLP, by the name that the config has for it.
    rms_norm : bool
        The norms are RMSNorm; otherwise they are LayerNorm.
    rotary, partial : bool
        Positions are rotary embeddings; those may leave a part of each head as it is.
    transposed : bool
        transformers stores the weights of linear layers transposed.
    """

    name: str
    interleaved: bool = False
    biases: frozenset[str] = frozenset()
    per_layer: bool = False
    square: bool = False
    activation: str = "silu"
    rms_norm: bool = True
    rotary: bool = True
    partial: bool = False
    transposed: bool = False


LLAMA = Architecture("llama", interleaved=True, biases=ALL)
DECI = Architecture("deci", interleaved=True, biases=ALL, per_layer=True)
QWEN2 = Architecture("qwen2", biases=QKV, square=True)
# By model type, in the order of preference.
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (QWEN2, LLAMA, DECI),
    "qwen3": (Architecture("qwen3"),),
    "smollm3": (Architecture("smollm3", interleaved=True),),
    "gemma3_text": (Architecture("gemma3", activation="gelu_pytorch_tanh"),),
    "gpt2": (
        Architecture(
            "gpt2",
            biases=frozenset({"c_attn", "c_fc", "c_proj"}),
            square=True,
            activation="gelu_new",
            rms_norm=False,
            rotary=False,
            transposed=True,
        ),
    ),
    # llama.cpp computes its GELU by the approximation with tanh.
    "gpt_neox": (
        Architecture(
            "gptneox",
            biases=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
            square=True,
            activation="gelu",
            rms_norm=False,
            partial=True,
        ),
    ),
}
NOPE_STEP = 4  # of smollm3 in llama.cpp: every fourth layer has no rotary embedding
GEMMA_STEP = 6  # of gemma3: every sixth layer attends to all tokens
GEMMA_LOCAL_THETA = 10000.0  # of the others


@dataclass(frozen=True)
class Layers:
    """Sizes of the layers, as an architecture takes them.

    Parameters
    ----------
    heads, kv_heads, channels : tuple of int
        One number per layer.
    head_dim : int
        Features of a head, the same in all layers.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    head_dim: int

    @property
    def equal(self) -> bool:
        """Whether all layers have the same sizes."""
        return all(len(set(each)) == 1 for each in (self.heads, self.kv_heads, self.channels))


def layers_of(model: nn.Module) -> Layers:
    """Return the sizes of a model's layers."""
    attn, mlp = sites(model, ("attn",)), sites(model, ("mlp",))
    return Layers(
        tuple(site.sizes["heads"] for site in attn),
        tuple(site.kv_heads for site in attn),
        tuple(site.d_in for site in mlp),
        attn[0].head_dim,
    )


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture that runs a model.

    Raises
    ------
    InputError
        If there is none, with the reason and what to do instead.
    """
    config, kind = model.config, model.config.model_type
    if kind not in ARCHITECTURES or not predicts_next_token(model):
        others = "--to onnx" if not predicts_next_token(model) else "the folder itself"
        raise _refusal(
            f"causal language models of {', '.join(ARCHITECTURES)} can be written, got "
            f"{type(model).__name__}; use {others}"
        )
    if not any(name == "AutoModelForCausalLM" for name in auto_classes(model)):
        raise _refusal(f"{type(model).__name__} has another head than a language model's")
    _check_config(block_config(family_of(model), config))
    return _first_that_fits(model, ARCHITECTURES[kind], layers_of(model))


def biased(model: nn.Module) -> dict[str, int]:
    """Return the layers of the blocks that have a bias, and how many blocks have each."""
    found: dict[str, int] = {}
    for site in sites(model):
        for name in (*site.producers, site.consumer):
            if getattr(model.get_submodule(name), "bias", None) is not None:
                found[name.split(".")[-1]] = found.get(name.split(".")[-1], 0) + 1
    return found


def _first_that_fits(
    model: nn.Module, candidates: tuple[Architecture, ...], layers: Layers
) -> Architecture:
    unequal, biases = not layers.equal, set(biased(model))
    stream = model.get_input_embeddings().weight.shape[1]
    square = layers.heads[0] * layers.head_dim == stream
    for each in candidates:
        fits = (each.per_layer or not unequal) and (square or not each.square)
        if fits and biases <= each.biases:
            return each
    kind, best = model.config.model_type, candidates[-1]
    if unequal and not best.per_layer:
        raise _refusal(
            f"{best.name} gives all layers the same sizes, those of this {kind} differ, and deci, "
            f"which takes any, has no {_lacks(kind)}; export it with --to uniform first, or prune "
            "with --uniform-layers"
        )
    if best.square and not square:
        raise _refusal(
            f"{best.name} has as many features in its heads as in the residual stream, here "
            f"{layers.heads[0] * layers.head_dim} and {stream}; prune with --sites mlp"
        )
    raise _refusal(
        f"{best.name} has no bias in {', '.join(sorted(biases - best.biases))}; prune with "
        "--reconstruct linear"
    )


def _lacks(kind: str) -> str:
    """Return what ``deci`` lacks of a family."""
    return {
        "qwen3": "norms of queries and keys",
        "smollm3": "layers without rotary embeddings",
        "gpt2": "learned positions",
        "gpt_neox": "LayerNorm",
    }.get(kind, "norms after the branches")


def _check_config(config: Any) -> None:
    """Refuse what llama.cpp computes otherwise, or has fixed at other values."""
    kind = config.model_type
    activation = ARCHITECTURES[kind][0].activation
    names = ("hidden_act", "hidden_activation", "activation_function")
    found = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    expected: dict[str, tuple[Any, Any]] = {"activation": (found, activation)}
    depth = config.num_hidden_layers
    if kind == "smollm3":
        rotary = [int((index + 1) % NOPE_STEP != 0) for index in range(depth)]
        expected["no_rope_layers"] = (list(map(int, config.no_rope_layers)), rotary)
        expected["use_sliding_window"] = (bool(config.use_sliding_window), False)
    if kind == "gemma3_text":
        kinds = [
            "sliding_attention" if (index + 1) % GEMMA_STEP else "full_attention"
            for index in range(depth)
        ]
        expected |= {
            "layer_types": (list(config.layer_types), kinds),
            "query_pre_attn_scalar": (config.query_pre_attn_scalar, config.head_dim),
            "final_logit_softcapping": (config.final_logit_softcapping, None),
            "attn_logit_softcapping": (config.attn_logit_softcapping, None),
            "use_bidirectional_attention": (bool(config.use_bidirectional_attention), False),
        }
        local = rope_parameters(config, "sliding_attention")
        expected["the local rope_theta"] = (local.get("rope_theta"), GEMMA_LOCAL_THETA)
        expected["the local rope_type"] = (local.get("rope_type", "default"), "default")
    if kind == "gpt2":
        expected["scale_attn_weights"] = (bool(config.scale_attn_weights), True)
        expected["scale_attn_by_inverse_layer_idx"] = (
            bool(config.scale_attn_by_inverse_layer_idx),
            False,
        )
    for name, (value, wanted) in expected.items():
        if value != wanted:
            raise _refusal(
                f"llama.cpp's {ARCHITECTURES[kind][0].name} has {name} {str(wanted)[:60]}, this "
                f"model {str(value)[:60]}; use the folder itself"
            )


def rope_parameters(config: Any, kind: str = "full_attention") -> Mapping[str, Any]:
    """Return the rotary parameters of a config, of one kind of layers where there are several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get(kind, parameters) or {}


def sliding_window(config: Any) -> int | None:
    """Return the window of local attention, if any layer has one."""
    if config.model_type == "qwen2" and not getattr(config, "use_sliding_window", False):
        return None
    return getattr(config, "sliding_window", None)


def _refusal(reason: str) -> InputError:
    return InputError(f"export: --to gguf: {reason}")
