"""Which architecture of llama.cpp runs a model, and what none of them can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from liar_ext.checkpoint.stock_config import auto_classes
from liar_ext.models.layers import layer_at
from liar_ext.models.registry import family_of
from liar_ext.models.running import block_config, predicts_next_token
from liar_ext.models.sites import SHARED, Site, sites
from liar_ext.models.whole import router_of
from liar_ext.system.errors import InputError

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ALL = QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Mixture:
    """How an architecture runs layers of experts."""

    # The weights of the experts that a token is sent to sum to one. None: they are sigmoids, and
    # the file says whether they do, and their scale.
    normalised: bool | None
    own_width: bool = False  # their width has a field of its own
    # Every token passes one more expert. The file says its width, or how many experts are as wide.
    shared: Literal["", "width", "count"] = ""
    leading: bool = False  # the first layers may have an ordinary MLP; otherwise none has


@dataclass(frozen=True)
class Architecture:
    """A row of the table of architectures."""

    name: str  # in llama.cpp and in the package gguf
    # Rotary embeddings turn neighbouring features, (0, 1), (2, 3), ..., in transformers halves,
    # (0, d/2), (1, d/2 + 1), ...: the rows of q and k are reordered. Otherwise both do the same.
    interleaved: bool = False
    biases: frozenset[str] = frozenset()  # layers of a block that may have one
    per_layer: bool = False  # sizes may differ by layer
    square: bool = False  # the heads together must have as many features as the stream
    activation: str = "silu"  # of the MLP, by the name in the config
    rms_norm: bool = True  # otherwise LayerNorm
    rotary: bool = True  # positions are rotary embeddings
    factors: bool = False  # which may have a factor for each frequency, as llama3 scales them
    partial: bool = False  # which may leave a part of each head as it is
    transposed: bool = False  # transformers stores the weights of linear layers so
    mixture: Mixture | None = None  # of the MLPs
    head: bool = False  # the file holds the output head even if it is the embedding
    scaled: bool = False  # embeddings, attention, branches and logits, by numbers in the config


LLAMA = Architecture("llama", interleaved=True, biases=ALL, factors=True)
DECI = Architecture("deci", interleaved=True, biases=ALL, per_layer=True, factors=True)
QWEN2 = Architecture("qwen2", biases=QKV, square=True)
# By model type, in the order of preference. Llama's, in its order of rows of q and k, compute the
# same as qwen2, which can't have fewer heads; only deci, without experts, has sizes by layer.
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
    "mixtral": (replace(LLAMA, biases=QKV | {"o_proj"}, mixture=Mixture(True)),),
    "qwen2_moe": (
        replace(QWEN2, name="qwen2moe", head=True, mixture=Mixture(False, True, "width")),
    ),
    "qwen3_moe": (Architecture("qwen3moe", mixture=Mixture(True, True)),),
    "olmoe": (Architecture("olmoe", square=True, head=True, mixture=Mixture(False)),),
    "granitemoe": (
        Architecture(
            "granitemoe",
            interleaved=True,
            biases=QKV | {"o_proj"},
            factors=True,
            mixture=Mixture(True),
            scaled=True,
        ),
    ),
    "glm4_moe": (
        Architecture(
            "glm4moe", biases=QKV, partial=True, mixture=Mixture(None, True, "count", leading=True)
        ),
    ),
    "ernie4_5_moe": (
        Architecture("ernie4_5-moe", mixture=Mixture(True, True, "width", leading=True)),
    ),
    "dots1": (
        Architecture("dots1", head=True, mixture=Mixture(None, True, "count", leading=True)),
    ),
    "hunyuan_v1_moe": (Architecture("hunyuan-moe", mixture=Mixture(True, True, "width")),),
}
# Of a config, what llama.cpp has fixed.
FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "olmoe": {"clip_qkv": None, "attention_bias": False},
    "glm4_moe": {"n_group": 1},
    "dots1": {"n_group": 1},
}
NOPE_STEP = 4  # of smollm3 in llama.cpp: every fourth layer has no rotary embedding
GEMMA_STEP = 6  # of gemma3: every sixth layer attends to all tokens
GEMMA_LOCAL_THETA = 10000.0  # of the others


@dataclass(frozen=True)
class Layers:
    """Sizes of the layers, as an architecture takes them: one number per layer."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]  # of the MLP, or of each expert
    head_dim: int  # the same in all layers
    experts: tuple[int, ...]  # 0 where the MLP is an ordinary one
    shared: tuple[int, ...]  # channels of an expert that every token passes; 0 without one
    active: tuple[int, ...]  # experts of a token; 0 where the MLP is an ordinary one

    @property
    def leading(self) -> int:
        """How many layers come before the first one with experts; all where none has some."""
        return next((index for index, count in enumerate(self.experts) if count), len(self.experts))

    @property
    def equal(self) -> bool:
        """Whether all layers have the same sizes; MLPs before the experts may have others."""
        first = self.leading
        routed = (each[first:] for each in (self.channels, self.experts, self.shared, self.active))
        all_sizes = (self.heads, self.kv_heads, self.channels[:first], *routed)
        return all(len(set(each)) <= 1 for each in all_sizes)


def layers_of(model: nn.Module) -> Layers:
    """Return the sizes of a model's layers."""
    config = block_config(family_of(model), model.config)
    beside = {s.block: s.d_in for s in sites(model, ("mlp",)) if s.name.endswith(f".{SHARED}")}
    mlp: dict[int, Site] = {}  # the first expert of a block that has some
    for site in sites(model, ("mlp",)):
        if not site.name.endswith(f".{SHARED}"):
            mlp.setdefault(site.block, site)
    if any(family_of(model).wirings("attn")):
        attn = sites(model, ("attn",))
        heads = tuple(site.sizes["heads"] for site in attn)
        kv_heads, head_dim = tuple(site.kv_heads for site in attn), attn[0].head_dim
    else:  # all layers keep what the config says
        heads = (config.num_attention_heads,) * len(mlp)
        kv_heads = (config.num_key_value_heads,) * len(mlp)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
    return Layers(
        heads,
        kv_heads,
        tuple(site.d_in for site in mlp.values()),
        head_dim,
        tuple(site.experts for site in mlp.values()),
        tuple(beside.get(block, 0) for block in mlp),
        tuple(router_of(model, site).top_k if site.experts else 0 for site in mlp.values()),
    )


def architecture_of(model: nn.Module) -> tuple[Architecture, Layers]:
    """Return the architecture that runs a model, and its sizes; refuse one that none runs."""
    config, kind = model.config, model.config.model_type
    if kind not in ARCHITECTURES or not predicts_next_token(model):
        others = "--to onnx" if not predicts_next_token(model) else "the folder itself"
        raise _refusal(
            f"causal language models of {', '.join(ARCHITECTURES)} can be written, got "
            f"{type(model).__name__}; use {others}"
        )
    if "AutoModelForCausalLM" not in auto_classes(model):
        raise _refusal(f"{type(model).__name__} has another head than a language model's")
    _check_config(block_config(family_of(model), config))
    candidates, layers = ARCHITECTURES[kind], layers_of(model)
    if candidates[0].mixture is not None:
        _check_experts(candidates[0].name, candidates[0].mixture, layers)
    return _first_that_fits(model, candidates, layers), layers


def _first_that_fits(
    model: nn.Module, candidates: tuple[Architecture, ...], layers: Layers
) -> Architecture:
    best, unequal = candidates[-1], not layers.equal
    places = {(path, s.expert) for s in sites(model) for path in (s.consumer, *s.producers)}
    biases = {
        path.rpartition(".")[2]
        for path, expert in places
        if getattr(layer_at(model, path, expert), "bias", None) is not None
    }
    stream = model.get_input_embeddings().weight.shape[1]
    square = layers.heads[0] * layers.head_dim == stream
    for each in candidates:
        fits = (each.per_layer or not unequal) and (square or not each.square)
        if fits and biases <= each.biases:
            return each
    if unequal and not best.per_layer:
        raise _refusal(
            f"{best.name} gives all layers the same sizes, and those of this model differ; prune "
            "with --uniform-layers, or, without experts, export it with --to uniform first"
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


def _check_experts(name: str, mixture: Mixture, layers: Layers) -> None:
    """Refuse layers of experts that no architecture has, and say what to do."""
    routed = layers.experts[layers.leading :] if mixture.leading else layers.experts
    if not routed or 0 in routed:
        where = "every layer after the first ones" if mixture.leading else "every layer"
        raise _refusal(
            f"{name} has experts in {where}, and {layers.experts.count(0)} of this model's "
            f"{len(layers.experts)} layers have an ordinary MLP; use the folder itself"
        )
    shared, width = layers.shared[-1], layers.channels[-1]
    if layers.equal and mixture.shared == "count" and (shared % width or not shared):
        raise _refusal(
            f"{name} has a shared expert as wide as one or several others together, here {shared} "
            f"channels and {width}; choose another --keep, or prune by --keep-experts alone"
        )


def _check_config(config: Any) -> None:
    """Refuse what llama.cpp computes otherwise, or has fixed at other values."""
    kind, depth = config.model_type, config.num_hidden_layers
    architecture = ARCHITECTURES[kind][0]
    names = ("hidden_act", "hidden_activation", "activation_function")
    found = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    wanted = {"activation": architecture.activation, **FIXED.get(kind, {})}
    values: dict[str, Any] = {"activation": found}
    normalised = architecture.mixture and architecture.mixture.normalised
    if normalised is not None and hasattr(config, "norm_topk_prob"):
        wanted["norm_topk_prob"] = normalised
    if kind == "smollm3":
        rotary = [int((index + 1) % NOPE_STEP != 0) for index in range(depth)]
        wanted |= {"no_rope_layers": rotary, "use_sliding_window": False}
        values |= {"no_rope_layers": list(map(int, config.no_rope_layers))}
    elif kind == "gemma3_text":
        kinds = ("full_attention", "sliding_attention")
        local = rope_parameters(config, "sliding_attention")
        wanted |= {
            "layer_types": [kinds[bool((index + 1) % GEMMA_STEP)] for index in range(depth)],
            "query_pre_attn_scalar": config.head_dim,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "the local rope_theta": GEMMA_LOCAL_THETA,
            "the local rope_type": "default",
        }
        values |= {
            "layer_types": list(config.layer_types),
            "the local rope_theta": local.get("rope_theta"),
            "the local rope_type": local.get("rope_type", "default"),
        }
    elif kind in ("olmoe", "dots1"):
        wanted["num_key_value_heads"] = config.num_attention_heads
    for name, right in wanted.items():
        value = values[name] if name in values else getattr(config, name)
        value = bool(value) if isinstance(right, bool) else value
        if value != right:
            raise _refusal(
                f"llama.cpp's {architecture.name} has {name} {str(right)[:60]}, this "
                f"model {str(value)[:60]}; use the folder itself"
            )


def rope_parameters(config: Any, kind: str = "full_attention") -> Mapping[str, Any]:
    """Return the rotary parameters of a config, of one kind of layers where there are several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get(kind, parameters) or {}


def sliding_window(config: Any) -> int | None:
    """Return the window of local attention, if any layer has one."""
    if config.model_type == "olmoe" or not getattr(config, "use_sliding_window", True):
        return None
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    return getattr(config, "sliding_window", None)


def _refusal(reason: str) -> InputError:
    return InputError(f"export: --to gguf: {reason}")
