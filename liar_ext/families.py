"""The table of model families: how the blocks of each are wired.

A family is one row, and :func:`register_family` adds a row. Nothing here looks at tensors; what a
row means for a given model is read by :mod:`liar_ext.arch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from liar_ext.errors import InputError


@dataclass(frozen=True)
class HeadInput:
    """An input of an attention module that is computed once, for all heads of the dense model.

    Parameters
    ----------
    module : str
        Path of the module inside the block.
    position, keyword : int, str
        Where its ``forward`` takes the tensor, of shape (batch, heads, queries, keys).
    """

    module: str
    position: int
    keyword: str


@dataclass(frozen=True)
class Wiring:
    """How one kind of site is wired; every path is relative to the block.

    ``numbers`` and ``config`` name the sizes of :attr:`Site.sizes`.

    Parameters
    ----------
    producers : tuple of str
        Linear layers whose rows belong to the units: one run of rows per channel or query head.
    consumer : str
        The linear layer that reads the units.
    key_value : tuple of str
        Producers with one run of rows per key/value head.
    head_dim : str
        Attribute that holds the size of a head; empty for an MLP.
    stacked : int
        Runs of all units that one producer stacks: 3 where a layer computes ``[q; k; v]``.
    transposed : bool
        Weights are stored as (d_in, d_out), as in ``Conv1D``.
    numbers : mapping of str to str
        Integers that the modules keep, and the size that each one must hold.
    config : mapping of str to str, or None
        Config fields that express equal layers, and the size that each one holds; None if the
        stock class can't be built with fewer units.
    bias_flag : str or None
        Config field that gives all these layers a bias.
    head_input : HeadInput or None
        An input from outside of the block with one slice per head.
    """

    producers: tuple[str, ...]
    consumer: str
    key_value: tuple[str, ...] = ()
    head_dim: str = ""
    stacked: int = 1
    transposed: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] | None = None
    bias_flag: str | None = None
    head_input: HeadInput | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of the site: producers, then the consumer."""
        return (*self.producers, *self.key_value, self.consumer)


@dataclass(frozen=True)
class Family:
    """One model family.

    Parameters
    ----------
    name : str
        ``config.model_type``.
    blocks : str
        Path of the list of blocks inside the base model.
    attn, mlp : Wiring
        The two sites of a block. ``mlp`` may be several alternatives: the first whose layers
        exist is taken.
    config : str
        Path inside the config of the part that describes the blocks; empty for the config itself.
    """

    name: str
    blocks: str
    attn: Wiring
    mlp: Wiring | tuple[Wiring, ...]
    config: str = ""


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
)
_NO_ATTN_FLAG = replace(_LLAMA.attn, bias_flag=None)
_NO_MLP_FLAG = replace(_LLAMA.mlp, bias_flag=None)

register_family(_LLAMA)
register_family(replace(_LLAMA, name="smollm3"))
register_family(replace(_LLAMA, name="qwen3", mlp=_NO_MLP_FLAG))
register_family(replace(_LLAMA, name="gemma3_text", mlp=_NO_MLP_FLAG))
register_family(replace(_LLAMA, name="mistral", attn=_NO_ATTN_FLAG, mlp=_NO_MLP_FLAG))
register_family(replace(_LLAMA, name="qwen2", attn=_NO_ATTN_FLAG, mlp=_NO_MLP_FLAG))
register_family(
    replace(
        _LLAMA,
        name="gemma3",
        blocks="language_model.layers",
        mlp=_NO_MLP_FLAG,
        config="text_config",
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
