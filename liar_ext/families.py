"""The table of model families: how the blocks of each are wired.

A family is one row, and :func:`register_family` adds a row. Nothing here looks at tensors; what a
row means for a given model is read by :mod:`liar_ext.arch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import nn

from liar_ext import streams
from liar_ext.errors import InputError
from liar_ext.wiring import Family, HeadInput, Wiring

# The table. One row a family, checked against the source of transformers 5.24 and by a test that
# slicing equals zeroing.

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family to the table, or replace the row of that name, and return it.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from liar_ext.arch import family_of, register_family
    >>> register_family(replace(family_of(llama), name="my_llama"))  # doctest: +SKIP
    """
    FAMILIES[family.name] = family
    return family


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, by its ``config.model_type``.

    Raises
    ------
    InputError
        If the model has no config, or the table has no such family.
    """
    name = getattr(getattr(model, "config", None), "model_type", None)
    if name in FAMILIES:
        return FAMILIES[name]
    raise InputError(
        f"sites: unknown architecture {name!r} ({type(model).__name__}); known are "
        f"{', '.join(sorted(FAMILIES))}. Describe it once: liar_ext.register_family(Family("
        f"name={name!r}, blocks='layers', attn=Wiring(producers=('self_attn.q_proj',), "
        "key_value=('self_attn.k_proj', 'self_attn.v_proj'), consumer='self_attn.o_proj', "
        "head_dim='self_attn.head_dim'), mlp=Wiring(producers=('mlp.gate_proj', 'mlp.up_proj'), "
        "consumer='mlp.down_proj'))) with Family and Wiring from liar_ext.arch"
    )


def block_config(family: Family, config: Any) -> Any:
    """Return the part of a model's config that describes the blocks."""
    return get_path(config, family.config) if family.config else config


def get_path(root: Any, path: str) -> Any:
    """Return the attribute of ``root`` at a dotted path."""
    return reduce(getattr, path.split("."), root)


def blocks_of(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each block of a model."""
    path = f"{base_path(model)}{family.blocks}"
    try:
        blocks = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"sites: {type(model).__name__} has no {path!r}, where family {family.name!r} keeps "
            "its blocks; pass the whole model, or register a family that fits"
        ) from error
    for index, block in enumerate(blocks):
        yield f"{path}.{index}", block


def base_path(model: nn.Module) -> str:
    """Return what the paths inside the base model begin with: nothing, or a path and a dot."""
    base = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}." if prefix else ""


# Llama and its kin compute head counts from the shapes of q, k and v; only the eager kernel reads
# num_key_value_groups.
_HEADS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
_LLAMA = Family(
    name="llama",
    blocks="layers",
    attn=Wiring(
        producers=("self_attn.q_proj",),
        key_value=("self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.o_proj",
        head_dim="self_attn.head_dim",
        numbers={"self_attn.num_key_value_groups": "group_size"},
        config=_HEADS,
        bias_flag="attention_bias",
    ),
    mlp=Wiring(
        producers=("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
        numbers={"mlp.intermediate_size": "features"},
        config={"intermediate_size": "features"},
        bias_flag="mlp_bias",
    ),
    stream=streams.LLAMA,
)
_NO_ATTN_FLAG = replace(_LLAMA.attn, bias_flag=None)
_NO_MLP_FLAG = replace(_LLAMA.mlp, bias_flag=None)

register_family(_LLAMA)
register_family(replace(_LLAMA, name="smollm3"))
register_family(replace(_LLAMA, name="qwen3", mlp=_NO_MLP_FLAG))
register_family(replace(_LLAMA, name="gemma3_text", mlp=_NO_MLP_FLAG, stream=None))
register_family(replace(_LLAMA, name="mistral", attn=_NO_ATTN_FLAG, mlp=_NO_MLP_FLAG))
register_family(replace(_LLAMA, name="qwen2", attn=_NO_ATTN_FLAG, mlp=_NO_MLP_FLAG))
register_family(
    replace(
        _LLAMA,
        name="gemma3",
        blocks="language_model.layers",
        mlp=_NO_MLP_FLAG,
        config="text_config",
        stream=None,
    )
)

# BERT derives the size of a head from hidden_size / num_attention_heads, so that no config builds
# fewer heads of the same size.
_BERT = Family(
    name="bert",
    blocks="encoder.layer",
    attn=Wiring(
        producers=("attention.self.query",),
        key_value=("attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        head_dim="attention.self.attention_head_size",
        numbers={
            "attention.self.num_attention_heads": "heads",
            "attention.self.all_head_size": "features",
        },
    ),
    mlp=Wiring(
        producers=("intermediate.dense",),
        consumer="output.dense",
        config={"intermediate_size": "features"},
    ),
    stream=streams.BERT,
)
register_family(_BERT)
register_family(replace(_BERT, name="roberta"))
register_family(
    replace(
        _BERT,
        name="mpnet",
        attn=Wiring(
            producers=("attention.attn.q",),
            key_value=("attention.attn.k", "attention.attn.v"),
            consumer="attention.attn.o",
            head_dim="attention.attn.attention_head_size",
            numbers={
                "attention.attn.num_attention_heads": "heads",
                "attention.attn.all_head_size": "features",
            },
            # The encoder computes the relative position bias once, for all blocks and heads.
            head_input=HeadInput("attention.attn", 2, "position_bias"),
        ),
        stream=streams.MPNET,
    )
)
register_family(
    Family(
        name="distilbert",
        blocks="transformer.layer",
        attn=Wiring(
            producers=("attention.q_lin",),
            key_value=("attention.k_lin", "attention.v_lin"),
            consumer="attention.out_lin",
            head_dim="attention.attention_head_size",
            numbers={"attention.n_heads": "heads"},
        ),
        mlp=Wiring(producers=("ffn.lin1",), consumer="ffn.lin2", config={"hidden_dim": "features"}),
        stream=streams.DISTILBERT,
    )
)
register_family(
    Family(
        name="opt",
        blocks="decoder.layers",
        attn=Wiring(
            producers=("self_attn.q_proj",),
            key_value=("self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.out_proj",
            head_dim="self_attn.head_dim",
            numbers={"self_attn.num_heads": "heads", "self_attn.embed_dim": "features"},
        ),
        mlp=Wiring(producers=("fc1",), consumer="fc2", config={"ffn_dim": "features"}),
        stream=streams.OPT,
    )
)
# GPT-2 computes [q; k; v] in one transposed layer and splits the result at split_size.
register_family(
    Family(
        name="gpt2",
        blocks="h",
        attn=Wiring(
            producers=("attn.c_attn",),
            consumer="attn.c_proj",
            head_dim="attn.head_dim",
            stacked=3,
            transposed=True,
            numbers={
                "attn.num_heads": "heads",
                "attn.embed_dim": "features",
                "attn.split_size": "features",
            },
        ),
        mlp=Wiring(
            producers=("mlp.c_fc",),
            consumer="mlp.c_proj",
            transposed=True,
            config={"n_inner": "features"},
        ),
    )
)
# GPT-NeoX fuses per head: the rows of a head are its q, k and v, so a head is one run of rows.
register_family(
    Family(
        name="gpt_neox",
        blocks="layers",
        attn=Wiring(
            producers=("attention.query_key_value",),
            consumer="attention.dense",
            head_dim="attention.head_size",
            bias_flag="attention_bias",
        ),
        mlp=Wiring(
            producers=("mlp.dense_h_to_4h",),
            consumer="mlp.dense_4h_to_h",
            config={"intermediate_size": "features"},
        ),
        stream=streams.GPT_NEOX,
    )
)
_VIT = Family(
    name="vit",
    blocks="layers",
    attn=Wiring(
        producers=("attention.q_proj",),
        key_value=("attention.k_proj", "attention.v_proj"),
        consumer="attention.o_proj",
        head_dim="attention.head_dim",
        numbers={"attention.num_attention_heads": "heads"},
        config={"num_attention_heads": "heads", "head_dim": "head_dim"},
    ),
    mlp=Wiring(
        producers=("mlp.fc1",), consumer="mlp.fc2", config={"intermediate_size": "features"}
    ),
)
register_family(_VIT)
# DINOv2 sizes its MLP by a whole-numbered mlp_ratio, which no pruned size meets in practice.
register_family(
    replace(
        _VIT,
        name="dinov2",
        blocks="encoder.layer",
        mlp=(
            Wiring(producers=("mlp.fc1",), consumer="mlp.fc2"),
            Wiring(producers=("mlp.gate_proj", "mlp.up_proj"), consumer="mlp.down_proj"),
        ),
    )
)
