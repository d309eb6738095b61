"""What rows of several families share: shorthands for their words, and reasons for ``without``."""

from __future__ import annotations

from collections.abc import Mapping

from liar_ext.models.family import Stack, Step, Wiring

JOINT = "its q_norm and k_norm run over all heads at once"
BORROWED = "some layers read keys and values of others"
PICTURES = "what reads pictures writes hidden features, too"
HEADS_OF_HIDDEN = "heads: its config derives the size of a head from the hidden size"
ROUTED = "its routers read it, and a narrower one sends tokens elsewhere"
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
    """Return attention by its module and, in there, query, key, value and output.

    With a ``stack`` the layers are two: that of queries, keys and values, and the output.
    """
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
    """Return steps of a stream, each written as what it does and the layers that do it.

    It passes a site by what the producers read and the consumer writes.
    """
    found: list[Step] = []
    for item in items:
        if isinstance(item, Wiring):
            found += (Step("read", item.layers[:-1]), Step("write", (item.consumer,)))
        elif isinstance(item, Step):
            found.append(item)
        else:
            does, *layers = item.split()
            found.append(Step(does, tuple(layers)))
    return tuple(found)
