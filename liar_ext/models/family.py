"""How a model family is described: the words of a row of the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from liar_ext.errors import InputError

WITHOUT = ("attn", "kv_group", "mlp", "hidden", "stock", "layerwise")


@dataclass(frozen=True)
class HeadInput:
    """An input of an attention module that is computed once, for all heads of the dense model.

    Parameters
    ----------
    module : str
        Path of the module inside the block.
    position, keyword : int, str
        Where its ``forward`` takes the tensor, of shape (batch, heads, queries, keys).
    output : int or None
        Where its output passes the tensor on to the next block; None if it doesn't.
    table : str
        Embedding inside the module, one column per head, that makes the tensor where the module is
        given none, as in the first block; empty if there is none.
    own : bool
        The module makes the tensor by itself, for the heads that it has, where it is given none.
    """

    module: str
    position: int
    keyword: str
    output: int | None = None
    table: str = ""
    own: bool = False


class Stack(NamedTuple):
    """Several matrices stacked in one weight.

    Their rows come matrix by matrix, or, with ``by_group``, KV group by KV group (head by head
    where none is shared), and in each group matrix by matrix::

        ("query", "key", "value")            q0 q1 q2 q3 k0 k1 v0 v1
        ("query", "key", "value"), True      q0 q1 k0 v0 q2 q3 k1 v1

    ``key`` and ``value`` have one run of rows per key/value head; any other name, such as
    ``query``, ``gate`` or ``up``, one per query head or channel.
    """

    matrices: tuple[str, ...]
    by_group: bool = False

    @property
    def shared(self) -> int:
        """How many of the matrices have rows per key/value head."""
        return sum(matrix in ("key", "value") for matrix in self.matrices)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: where their weights are kept, and what sends tokens to them.

    The layers of a wiring with experts are parameters of ``module``, ``(experts, ...)``, each with
    a bias of its name and ``_bias`` or none.

    Parameters
    ----------
    module : str
        Path of the module that holds the experts, called with tokens, the experts chosen for each
        and their weights.
    router, weight : str
        Path of the module that chooses ``top_k`` experts of a token, and gives logits, weights and
        experts; inside of it the path of its weight, with a row per expert, as a bias beside it.
    choice : str
        Path of a buffer outside of the router, one number per expert, that it is called with beside
        the tokens; empty if there is none. A model may lack it.
    """

    module: str
    router: str
    weight: str = "weight"
    choice: str = ""


@dataclass(frozen=True)
class Wiring:
    """How one kind of site is wired; every path is relative to the block.

    ``numbers`` and ``config`` name the sizes of :attr:`Site.sizes`.

    Parameters
    ----------
    producers, key_value : tuple of str
        Linear layers whose rows belong to the units: with one run of rows per channel or query
        head, and with one per key/value head.
    consumer : str
        The linear layer that reads the units.
    head_dim : str
        Attribute that holds the size of a head; empty for an MLP.
    stacked : mapping of str to Stack
        Those of ``producers`` that hold several matrices, and in which order.
    transposed : bool
        Weights are stored as (d_in, d_out), as in ``Conv1D``.
    numbers : mapping of str to str
        Integers that the modules keep, and the size that each one must hold; ``self_attn.config.x``
        is one that ``forward`` reads from the config of the model.
    config : mapping of str to str, or None
        Config fields that express equal layers, and the size that each one holds; None if the
        stock class can't be built with fewer units.
    bias_flag : str or None
        Config field that gives all these layers a bias.
    head_input : HeadInput or None
        An input from outside of the block with one slice per head.
    requires : mapping of str to object
        Config fields, and the values of them that all this is true for; a model with others keeps
        these sites whole.
    optional : bool
        Whether some blocks have no such site, but another kind of layer in its place.
    per_head : tuple of str
        Parameters with one number per query head.
    experts : Experts or None
        Where every expert has layers of these paths, which then name parameters.
    output_norm : str
        A norm of the block that reads what the consumer gives, and that alone; empty if none does.
    """

    producers: tuple[str, ...]
    consumer: str
    key_value: tuple[str, ...] = ()
    head_dim: str = ""
    stacked: Mapping[str, Stack] = field(default_factory=dict)
    transposed: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] | None = None
    bias_flag: str | None = None
    head_input: HeadInput | None = None
    requires: Mapping[str, object] = field(default_factory=dict)
    optional: bool = False
    per_head: tuple[str, ...] = ()
    experts: Experts | None = None
    output_norm: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.stacked, Mapping) or not self.stacked.keys() <= set(self.producers):
            raise InputError(
                "Wiring: stacked must map some of the producers to a Stack, got "
                f"{self.stacked!r}; for [q; k; v] in one layer write "
                "stacked={'c_attn': Stack(('query', 'key', 'value'))}"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers of the site: producers, then the consumer."""
        return (*self.producers, *self.key_value, self.consumer)


class Step(NamedTuple):
    """One step of what happens to the residual stream.

    Parameters
    ----------
    does : {"write", "norm", "branch_norm", "read", "read_first", "take", "aside"}, also with "_if"
        ``write``: layers whose rows, or embeddings whose columns, are features of the stream, and
        parameters whose last dimension is.
        ``norm``: a norm over the features; what it puts out is read from there on.
        ``branch_norm``: a norm over what a branch wrote, before it is added to the stream.
        ``read``: linear layers whose columns are the features; ``read_first``: those that read the
        first token alone. ``take``: those that read together, through no norm, what a layer wrote,
        or the stream. ``aside``: layers that hold no feature of the stream, be they as wide. With
        ``_if``: of these layers, those that the model, or this block, has.
    layers : tuple of str
        Paths. A layer may read in one step and write in the next.
    """

    does: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """How the residual stream of a family is written, normalised and read, in that order.

    Readers read what the last norm before them put out, be it in the block before; where there is
    none yet, the stream as it is.

    Parameters
    ----------
    start : tuple of Step
        Before the blocks; paths inside the base model, or inside the model where its base model is
        the stack of blocks alone.
    block : tuple of Step
        In every block; paths inside the block.
    ends : tuple of tuple of Step
        After the blocks: chains that begin with the stream each, the first of which has a layer
        decides about it. Paths inside the base model, or inside the model with its task head. What
        a model lacks is skipped, and so is a chain whose first step it lacks.
    config : mapping of str to str
        Config fields that follow, and the size that each one holds: ``hidden``, or one of
        :attr:`Site.sizes` of attention, which the stock class ties to the hidden size. Where the
        attention can't be pruned, only ``head_dim`` of these, that of the dense model.
    multiple_of : {"heads", "head_dim", "any"} or None
        What the hidden size of the stock class must be a multiple of, if of anything; None where
        that class can't be built anyway.
    requires : mapping of str to object
        Config fields, and the values of them that all this is true for.
    norm_offset : float
        What its norms add to their weights before they scale by them.
    scaled : bool
        Whether embeddings are multiplied by the root of the hidden size, which their table keeps
        as the buffer ``embed_scale`` and the number ``scalar_embed_scale``.
    """

    start: tuple[Step, ...]
    block: tuple[Step, ...]
    ends: tuple[tuple[Step, ...], ...]
    config: Mapping[str, str]
    multiple_of: str | None
    requires: Mapping[str, object] = field(default_factory=dict)
    norm_offset: float = 0.0
    scaled: bool = False


@dataclass(frozen=True)
class Part:
    """A stack of blocks, one of those that a family has: an encoder, say, or the tower of images.

    Parameters
    ----------
    name : str
        What the names of its sites begin with, as in ``decoder.3.mlp``; empty for an only one.
    blocks, attn, mlp, shared_mlp, config, repeats
        As for :class:`Family`.
    cross_attn : Wiring or None
        The attention to another part, which comes between the two other sites.
    input, mask : str
        The input of the model that this part reads, empty for the main one, and the one that says
        which of its tokens are padding, empty if none are.
    """

    name: str
    blocks: str
    attn: Wiring | tuple[Wiring, ...] | None
    mlp: Wiring | tuple[Wiring, ...] | None
    cross_attn: Wiring | None = None
    shared_mlp: Wiring | None = None
    config: str = ""
    input: str = ""
    mask: str = "attention_mask"
    repeats: bool = False

    def alternatives(self, kind: str) -> tuple[Wiring, ...]:
        """Return the wirings that a site may have, by the name of the field."""
        row = getattr(self, kind)
        return () if row is None else row if isinstance(row, tuple) else (row,)


@dataclass(frozen=True)
class Family:
    """One model family.

    Parameters
    ----------
    name : str
        ``config.model_type``.
    blocks : str
        Path of the list of blocks inside the base model; ``*`` stands for every module of a list.
    attn, mlp : Wiring, tuple of Wiring, or None
        The two sites of a block, each one wiring or several alternatives, the first of which
        whose layers exist is taken; None where the family can't have it pruned.
    shared_mlp : Wiring or None
        The MLP that every token passes beside the experts that it is sent to; optional.
    config : str
        Path inside the config of the part that describes the blocks; empty for the config itself.
    stream : Stream, tuple of Stream, or None
        Its residual stream, or several alternatives, the first of which whose first layers exist is
        taken; None if the hidden size can't be pruned.
    without : mapping of str to str
        What can't be done with the family, and why, in a few words: ``attn`` and ``mlp`` can't be
        pruned, ``kv_group`` not as whole groups, the ``hidden`` size not (beside a stream: not of
        models that it isn't of), no ``stock`` config says the sizes, or no job is ``layerwise``,
        as its blocks can't be run one by one.
    repeats : bool
        Blocks run several times in one forward pass, with the same weights.
    lends : bool
        Blocks read more of earlier ones than hidden states, such as keys and values.
    parts : tuple of Part
        Where the model has several stacks of blocks: these, in the order of computation, in place
        of ``blocks``, ``attn``, ``mlp`` and ``config``. A model may have some of them only.
    """

    name: str
    blocks: str = ""
    attn: Wiring | tuple[Wiring, ...] | None = None
    mlp: Wiring | tuple[Wiring, ...] | None = None
    shared_mlp: Wiring | None = None
    config: str = ""
    stream: Stream | tuple[Stream, ...] | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = False
    lends: bool = False
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        unknown = self.without.keys() - set(WITHOUT)
        if unknown:
            raise InputError(
                f"Family: without may name {', '.join(WITHOUT)}, got {', '.join(sorted(unknown))}"
            )

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """Its stacks of blocks, be it one or several."""
        own = {name: getattr(self, name) for name in ("shared_mlp", "config", "repeats")}
        return self.parts or (Part("", self.blocks, self.attn, self.mlp, **own),)

    def wirings(self, kind: str) -> list[Wiring]:
        """Return all wirings of a kind of site, of all parts and alternatives."""
        labels = ("attn", "cross_attn") if kind == "attn" else (kind,)
        return [w for part in self.all_parts for each in labels for w in part.alternatives(each)]
