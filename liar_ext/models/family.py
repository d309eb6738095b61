"""How a model family is described: the words of a row of the table of families, and shorthands.

All paths are relative to the block, unless something else is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import NamedTuple

from liar_ext.system.errors import InputError

DOES = ("write", "norm", "branch_norm", "read", "read_first", "take", "aside")  # or "..._if"
WITHOUT = ("attn", "kv_group", "mlp", "experts", "hidden", "stock", "layerwise")


@dataclass(frozen=True)
class HeadInput:
    """An input of an attention module that is computed once, for all heads of the dense model."""

    module: str  # path
    position: int  # where its forward takes the tensor, of shape (batch, heads, queries, keys)
    keyword: str
    output: int | None = None  # where its output passes the tensor on to the next block, if it does
    table: str = ""  # embedding inside of it, a column per head, that makes a tensor not given
    own: bool = False  # given none, the module makes the tensor for the heads that it has


class Stack(NamedTuple):
    """Several matrices stacked in one weight.

    Their rows come matrix by matrix, or, with ``by_group``, KV group by KV group (head by head
    where none is shared), and in each group matrix by matrix::

        ("query", "key", "value")            q0 q1 q2 q3 k0 k1 v0 v1
        ("query", "key", "value"), True      q0 q1 k0 v0 q2 q3 k1 v1

    Those in ``grouped`` have one run of rows per key/value head; any other, such as ``query``,
    ``gate`` or ``up``, one per query head or channel; those in ``single`` one row per query head.
    """

    matrices: tuple[str, ...]
    by_group: bool = False
    grouped: tuple[str, ...] = ("key", "value")
    single: tuple[str, ...] = ()

    @property
    def shared(self) -> int:
        """How many of the matrices have rows per key/value head."""
        return sum(matrix in self.grouped for matrix in self.matrices)

    def rows(self, of_all: int, own: int, heads: int) -> dict[str, int]:
        """Return the rows of each matrix: ``of_all`` together, ``own`` of all query heads."""
        known = {
            matrix: heads if matrix in self.single else own
            for matrix in self.matrices
            if matrix not in self.grouped
        }
        each = (of_all - sum(known.values())) // self.shared if self.shared else 0
        return {matrix: known.get(matrix, each) for matrix in self.matrices}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: where their weights are kept, and what sends tokens to them.

    The layers of a wiring with experts are parameters of ``module``, ``(experts, ...)``, each with
    a bias of its name and ``_bias`` or none.
    """

    module: str  # called with tokens, the experts chosen for each and their weights
    router: str  # chooses top_k experts of a token; gives logits, weights and chosen experts
    weight: str = "weight"  # of the router, with a row per expert, as a bias beside it
    choice: str = ""  # buffer, a number per expert, that the router is called with, if it is there
    # Whether the module is called with r h alone, of all tokens for one expert after another, and
    # gives each expert's output likewise; r = 0 where a token isn't sent.
    scales_input: bool = False


@dataclass(frozen=True)
class Wiring:
    """How one kind of site is wired; sizes are named as by :attr:`Site.sizes`."""

    producers: tuple[str, ...]  # linear layers with one run of rows per channel or query head
    consumer: str  # the linear layer that reads the units
    also: tuple[str, ...] = ()  # more that read them of other tokens: text beside an image, say
    columns: str = ""  # where a consumer that reads something else, too, has them: first or last
    key_value: tuple[str, ...] = ()  # producers with one run of rows per key/value head
    # Attribute that holds the size of a head, or two with // between; empty if units are channels.
    head_dim: str = ""
    # The same of a key head, where heads keep one state in place of the keys and values of all
    # tokens: linear attention, and Mamba. "Query heads" are the heads of values then.
    key_dim: str = ""
    whole_groups: bool = False  # heads leave by whole groups alone, as a norm runs over these
    # Producers, and parameters of heads, that hold several matrices.
    stacked: Mapping[str, Stack] = field(default_factory=dict)
    transposed: bool = False  # weights are stored as (d_in, d_out), as in Conv1D
    # Integers that modules keep, and the size that each must hold; self_attn.config.x is one that
    # forward reads from the config of the model, and with ? at its end a module may lack it.
    numbers: Mapping[str, str] = field(default_factory=dict)
    # Config fields that express equal layers, and the size that each holds; None if the stock class
    # can't be built with fewer units.
    config: Mapping[str, str] | None = None
    bias_flag: str | None = None  # config field that gives all these layers a bias
    head_input: HeadInput | None = None  # from outside of the block, with one slice per head
    # Config fields, and the values that all this is true for; else these sites stay whole.
    requires: Mapping[str, object] = field(default_factory=dict)
    optional: bool = False  # some blocks have another kind of layer in the place of such a site
    # Parameters whose first dimension is a run for each query head: a number, or the channels of a
    # depthwise convolution; of an embedding, a column. A model may lack them.
    per_head: tuple[str, ...] = ()
    experts: Experts | None = None  # where every expert has such layers, which name parameters then
    output_norm: str = ""  # norm that reads what the consumer gives, and that alone

    def __post_init__(self) -> None:
        if unknown := self.stacked.keys() - {*self.producers, *self.per_head}:
            raise InputError(f"Wiring: stacked must name producers, got {', '.join(unknown)}")

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of the site: producers, then what reads the units."""
        return (*self.producers, *self.key_value, *self.also, self.consumer)


class Step(NamedTuple):
    """One step of what happens to the residual stream: what it does, and the paths of layers.

    ============  ==================================================================================
    write         layers whose rows, or embeddings whose columns, are features of the stream, and
                  parameters whose last dimension is
    norm          a norm over the features; what it puts out is read from there on
    branch_norm   a norm over what a branch wrote, before it is added to the stream
    read          linear layers whose columns are the features
    site          sites of the block, by what their producers read and their consumer writes; its
                  output_norm is a branch_norm, and what they have for heads is aside
    read_first    those that read the first token alone
    take          those that read together, through no norm, what a layer wrote, or the stream
    aside         layers that hold no feature of the stream, be they as wide
    ..._if        of these layers those that the model, or this block, has
    ============  ==================================================================================

    A layer may read in one step and write in the next.
    """

    does: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """How the residual stream of a family is written, normalised and read, in that order.

    Readers read what the last norm before them put out, be it in the block before; where there is
    none yet, the stream as it is.
    """

    # Before the blocks; paths inside the base model, or inside the model where its base model is
    # the stack of blocks alone.
    start: tuple[Step, ...]
    block: tuple[Step, ...]  # in every block
    # After the blocks: chains that begin with the stream each, the first of which has a layer
    # decides about it. Paths inside the base model, or the model with its task head. What a model
    # lacks is skipped, and so is a chain whose first step it lacks.
    ends: tuple[tuple[Step, ...], ...]
    # Config fields that follow, and the size that each holds: hidden, or one of attention that the
    # stock class ties to it. Where attention can't be pruned only head_dim, the dense model's.
    config: Mapping[str, str]
    # What the hidden size must be a multiple of: "heads", "head_dim" or "any"; None where the stock
    # class can't be built anyway.
    multiple_of: str | None
    # Config fields, and the values that all this is true for.
    requires: Mapping[str, object] = field(default_factory=dict)
    norm_offset: float = 0.0  # what its norms add to their weights before they scale by them
    # Whether embeddings are multiplied by the root of the hidden size, which their table keeps as
    # the buffer embed_scale and the number scalar_embed_scale.
    scaled: bool = False


@dataclass(frozen=True)
class Part:
    """A stack of blocks that a family has: an encoder, say, or the tower of images."""

    name: str  # begins the names of its sites, as in decoder.3.mlp; empty for an only one
    blocks: str = ""  # path of their list inside the base model; * is every module of a list
    # Sites: one wiring, or alternatives, of which the first whose layers exist is taken; None where
    # the family can't have it pruned.
    attn: Wiring | tuple[Wiring, ...] | None = None
    mlp: Wiring | tuple[Wiring, ...] | None = None
    _: KW_ONLY
    cross_attn: Wiring | None = None  # attention to another part, between the two other sites
    shared_mlp: Wiring | None = None  # every token passes it beside its experts; optional
    context_mlp: Wiring | tuple[Wiring, ...] | None = None  # of the text beside an image
    config: str = ""  # path of the part of the config that describes the blocks; empty for all
    input: str = ""  # of the model, which this part reads; empty for the main one
    mask: str = "attention_mask"  # says which of its tokens are padding; empty if none are
    repeats: bool = False  # blocks run several times in one forward pass, with the same weights

    def alternatives(self, kind: str) -> tuple[Wiring, ...]:
        """Return the wirings that a site may have, by the name of the field."""
        row = getattr(self, kind)
        return () if row is None else row if isinstance(row, tuple) else (row,)


@dataclass(frozen=True)
class Family(Part):
    """One model family, by ``config.model_type``, and its stack of blocks, unless it has parts."""

    _: KW_ONLY
    # The residual stream, or alternatives, of which the first whose first layers exist is taken;
    # None if the hidden size can't be pruned.
    stream: Stream | tuple[Stream, ...] | None = None
    # What can't be done, and why, in a few words: attn and mlp can't be pruned, kv_group not as
    # whole groups, whole experts not, the hidden size not (beside a stream: not of models that it
    # isn't of), no stock config says the sizes, no blocks can be run one by one (layerwise).
    without: Mapping[str, str] = field(default_factory=dict)
    lends: str = ""  # config field: unless it is 0, blocks read keys and values of earlier ones
    # Several stacks of blocks, in the order of computation. A model may have some of them only.
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if unknown := self.without.keys() - set(WITHOUT):
            known = ", ".join(WITHOUT)
            raise InputError(f"Family: without may name {known}, got {', '.join(unknown)}")

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """Its stacks of blocks, be it one or several."""
        return self.parts or (self.as_part(""),)

    def as_part(self, name: str, **changes: object) -> Part:
        """Return its own stack of blocks, under a name in a family of several."""
        own = {each.name: getattr(self, each.name) for each in fields(Part)}
        return Part(**{**own, "name": name, **changes})

    def wirings(self, kind: str) -> list[Wiring]:
        """Return all wirings of a kind of site, of all parts and alternatives."""
        labels = ("attn", "cross_attn") if kind == "attn" else (kind,)
        return [w for part in self.all_parts for each in labels for w in part.alternatives(each)]


# What rows of several families share: reasons for ``without``, and shorthands for their words.
JOINT = "its q_norm and k_norm run over all heads at once"
BORROWED = "some layers read keys and values of others"
PICTURES = "what reads pictures writes hidden features, too"
NO_STOCK = {"stock": "heads: its config derives the size of a head from the hidden size"}
TWO_STREAMS = "encoder and decoder have a residual stream each"

QKV = Stack(("query", "key", "value"))
QKV_BY_GROUP = Stack(("query", "key", "value"), by_group=True)
GATE_UP = Stack(("gate", "up"))
# Config fields of streams whose class ties the number of heads to the hidden size.
TIED = {"hidden_size": "hidden", "num_attention_heads": "heads"}


def attention(
    module: str,
    layers: str,
    head_dim: str = "head_dim",
    numbers: Mapping[str, str] | None = None,
    stack: Stack | None = None,
    **more: object,
) -> Wiring:
    """Return attention by its module and, in there, q, k, v (or a ``stack`` of them) and output."""
    query, *key_value, output = (f"{module}.{name}" for name in layers.split())
    return Wiring(
        producers=(query,),
        key_value=tuple(key_value),
        consumer=output,
        head_dim=f"{module}.{head_dim}",
        numbers={f"{module}.{name}": size for name, size in (numbers or {}).items()},
        stacked={query: stack} if stack else {},
        **more,
    )


def mlp(
    layers: str, field: str = "intermediate_size", stack: Stack | None = None, **more: object
) -> Wiring:
    """Return an MLP by its layers, the last of which is the consumer, and its config field."""
    *producers, consumer = layers.split()
    return Wiring(
        producers=tuple(producers),
        consumer=consumer,
        stacked={producers[0]: stack} if stack else {},
        config={field: "features"} if field else None,
        **more,
    )


def steps(*items: str | Wiring | Step) -> tuple[Step, ...]:
    """Return steps of a stream, each written as what it does and the layers that do it."""
    found: list[Step] = []
    for item in items:
        if isinstance(item, Wiring):
            found += (Step("read", item.layers[:-1]), Step("write", (item.consumer,)))
            found += [Step("branch_norm", (item.output_norm,))] if item.output_norm else []
            found += [Step("aside_if", item.per_head)] if item.per_head else []
        elif isinstance(item, Step):
            found.append(item)
        else:
            does, *layers = item.split()
            found.append(Step(does, tuple(layers)))
    return tuple(found)


def stream(
    start: Iterable[str | Wiring | Step],
    block: Iterable[str | Wiring | Step],
    *ends: Iterable[str | Wiring | Step],
    config: Mapping[str, str] = TIED,
    multiple_of: str | None = "head_dim",
    **more: object,
) -> Stream:
    """Return a stream from what :func:`steps` takes of its start, a block and each of its ends."""
    chains = tuple(steps(*end) for end in ends)
    return Stream(steps(*start), steps(*block), chains, config, multiple_of, **more)


def like(row: Family, names: str, **changes: object) -> tuple[Family, ...]:
    """Return rows with some changes, one under each of several names."""
    return tuple(replace(row, name=name, **changes) for name in names.split())
