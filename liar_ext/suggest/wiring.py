"""Read the sites of a block from what reaches the columns of a layer.

A consumer reads nothing of the stream but through other layers of its block, its producers. What
one output of a producer reaches says what it is::

    one column, its token alone              a channel; of attention, a gate on a head's outputs
    the columns of a head, its token alone   a query
    the columns of a group, other tokens     a key
    a column in each head of a group, other tokens      a value
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import NamedTuple

from liar_ext.models.family import Stack, Wiring
from liar_ext.suggest.instance import Refused
from liar_ext.suggest.trace import Reach, Trace

SHARED = ("key", "value")
NOTHING = {
    "attn": "no linear layer that attention writes was found",
    "mlp": "no linear layer that reads channels one by one was found",
}


class Found(NamedTuple):
    """A site as a trace shows it, with sizes of the block that was traced."""

    kind: str  # cross_attn reads keys and values of something else than the stream
    wiring: Wiring  # without head_dim, numbers and config
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def home(self) -> str:
        """The module that all of its layers are in; a dot if that is the block itself."""
        owners = [layer.rpartition(".")[0].replace(".", "/") for layer in self.wiring.layers]
        return posixpath.commonpath(owners).replace("/", ".") or "."


def find_sites(trace: Trace) -> tuple[dict[str, Found], dict[str, str]]:
    """Return the sites of a block by kind, and the reason for each kind that can't be described."""
    found: dict[str, list[Found]] = {"attn": [], "cross_attn": [], "mlp": []}
    reasons: dict[str, list[str]] = {"attn": [], "mlp": []}
    for consumer, parents in trace.parents.items():
        if not parents or consumer in trace.readers:
            continue
        reach = trace.reaches(consumer)
        rows = [row for each in reach.values() for row in each]
        is_mlp = all(row.local and len(row.columns) < 2 for row in rows)
        if all(row.local for row in rows) and not is_mlp:
            continue  # such as a low-rank product, or channels with a norm over them
        try:
            site = (_read_mlp if is_mlp else _read_attention)(trace, consumer, reach)
            found[site.kind].append(site)
        except Refused as error:
            reasons["mlp" if is_mlp else "attn"].append(str(error))
    sites, without = {}, {}
    if len(found["cross_attn"]) == 1:
        sites["cross_attn"] = found["cross_attn"][0]
    for kind in reasons:
        names = [each.wiring.consumer for each in found[kind]] + reasons[kind]
        if kind == "mlp" and (experts := _experts(trace)):
            without[kind] = f"{experts} holds experts, which aren't looked for"
        elif len(names) > 1:
            without[kind] = f"a block has {len(names)} such sites, not one: {', '.join(names[:3])}"
        elif found[kind]:
            sites[kind] = found[kind][0]
        else:
            without[kind] = names[0] if names else NOTHING[kind]
    return sites, without


def _experts(trace: Trace) -> str:
    """Return the module that holds a matrix for each of several experts, repeatedly; or nothing."""
    for path, module in trace.block.named_modules():
        counts = [len(each) for each in module.parameters(recurse=False) if each.ndim == 3]
        if len(counts) > 1 and len(set(counts)) == 1:
            return path
    return ""


def _through(trace: Trace, producers: Sequence[str], said: str = ", through") -> str:
    """Return the modules that lie between, in words; nothing if there are none."""
    between = trace.mixers(producers)
    return f"{said} {', '.join(between[:3])}" if between else ""


def _read_mlp(trace: Trace, consumer: str, reach: dict[str, list[Reach]]) -> Found:
    """Return the wiring of an MLP: every producer has a row, or several, for each channel."""
    channels = trace.layers[consumer].input.shape[-1]
    stacks = {}
    for producer, rows in reach.items():
        owners = [row.columns[0] if row.columns else -1 for row in rows]
        if len(rows) % channels or -1 in owners:
            raise Refused(
                f"{producer} has {len(rows)} rows, of which {len(rows) - owners.count(-1)} reach "
                f"the {channels} columns of {consumer}"
            )
        first = [row for row, owner in enumerate(owners) if owner == 0]
        names = tuple(f"part{index}" for index in range(len(rows) // channels))
        if len(names) == len(first) == 2:
            linear = [trace.is_linear_in(producer, row, consumer) for row in first]
            if linear.count(True) == 1:  # what acts linearly is ``up``
                names = tuple("up" if each else "gate" for each in linear)
        stacks[producer] = _stack(producer, names, owners, None, (channels, channels, 1))
    return Found("mlp", _wiring(trace, consumer, tuple(reach), (), stacks))


def _read_attention(trace: Trace, consumer: str, reach: dict[str, list[Reach]]) -> Found:
    """Return the wiring of attention, with the sizes of its heads."""
    head_dim = _head_dim(trace, consumer, reach)
    heads = trace.layers[consumer].input.shape[-1] // head_dim
    roles: dict[str, list[tuple[str, int, int]]] = {}
    for producer, rows in reach.items():
        each = [_role(row, head_dim) for row in rows]
        if None in each:
            raise Refused(_mixed(trace, producer, each.index(None), consumer))
        roles[producer] = each
    sizes = {size for each in roles.values() for role, _, size in each if role in SHARED}
    kv_heads = heads // max(sizes, default=heads)
    stacks = {}
    for producer, each in roles.items():
        names, owners, _ = zip(*each, strict=True)
        kinds = tuple(dict.fromkeys(names))
        stacks[producer] = _stack(producer, kinds, owners, names, (heads, kv_heads, head_dim))
    key_value = [n for role in SHARED for n, s in stacks.items() if s.matrices == (role,)]
    own = [name for name in stacks if name not in key_value]
    keys = key_value or [name for name, stack in stacks.items() if stack.shared]
    if len(sizes) != 1 or len(key_value) not in (0, 2) or not own or not keys:
        raise Refused(f"{consumer} reads no queries, keys and values of layers that a row can name")
    wiring = _wiring(trace, consumer, tuple(own), tuple(key_value), stacks)
    kind = "attn" if any(name in trace.readers for name in keys) else "cross_attn"
    return Found(kind, wiring, heads, kv_heads, head_dim)


def _head_dim(trace: Trace, consumer: str, reach: dict[str, list[Reach]]) -> int:
    """Return the size of a head: how many columns each query reaches, in one run."""
    sizes = set()
    for producer, rows in reach.items():
        for index, row in enumerate(rows):
            if row.local and len(row.columns) > 1:
                first, size = row.columns[0], len(row.columns)
                if row.columns != tuple(range(first, first + size)) or first % size:
                    raise Refused(_mixed(trace, producer, index, consumer))
                sizes.add(size)
    columns = trace.layers[consumer].input.shape[-1]
    if len(sizes) != 1 or columns % min(sizes):
        reached = " or ".join(map(str, sorted(sizes))) or "none"
        raise Refused(f"queries that {consumer} reads reach {reached} of its {columns} columns")
    if sizes == {columns}:
        raise Refused(
            f"every query reaches all {columns} columns of {consumer}: there is one head"
            + _through(trace, list(reach), ", or heads are mixed by")
        )
    return sizes.pop()


def _mixed(trace: Trace, producer: str, row: int, consumer: str) -> str:
    """Return the reason for which heads aren't units, with the modules in between."""
    said = f"row {row} of {producer} reaches columns of {consumer} that are no head's and no"
    return f"{said} group's{_through(trace, [producer])}"


def _role(row: Reach, head_dim: int) -> tuple[str, int, int] | None:
    """Return what a row is, its head or group, and how many heads; None if it is nothing."""
    heads = sorted({column // head_dim for column in row.columns})
    if not heads or heads != list(range(heads[0], heads[0] + len(heads))) or heads[0] % len(heads):
        return None
    whole = len(row.columns) == len(heads) * head_dim
    single = len(row.columns) == len(heads) and len({c % head_dim for c in row.columns}) == 1
    if not (whole or single) or (row.local and len(heads) > 1):
        return None
    kinds = ("query", "gate") if row.local else SHARED
    return kinds[0 if whole else 1], heads[0] // len(heads), len(heads)


def _stack(
    producer: str,
    names: tuple[str, ...],
    owners: Sequence[int],
    roles: Sequence[str] | None,
    sizes: tuple[int, int, int],
) -> Stack:
    """Return the layout of a weight that holds one matrix or several.

    ``owners`` has the head of every row, or the group of keys and values; ``roles`` the name of its
    matrix, if known; ``sizes`` are heads, groups and rows of each.
    """
    heads, kv_heads, head_dim = sizes
    for by_group, runs in ((False, 1), (True, kv_heads)):
        laid = []
        for run in range(runs):
            for name in names:
                count = (kv_heads if name in SHARED else heads) // runs
                laid += [(name, run * count + i) for i in range(count) for _ in range(head_dim)]
        if laid == list(zip(roles or [name for name, _ in laid], owners, strict=False)):
            return Stack(names, by_group)
    raise Refused(f"the rows of {producer} stack {', '.join(names)} in an order of its own")


def _wiring(
    trace: Trace,
    consumer: str,
    producers: tuple[str, ...],
    key_value: tuple[str, ...],
    stacks: dict[str, Stack],
) -> Wiring:
    return Wiring(
        producers=producers,
        consumer=consumer,
        key_value=key_value,
        stacked={name: stack for name, stack in stacks.items() if len(stack.matrices) > 1},
        transposed=trace.layers[consumer].transposed,
        output_norm=trace.norm_after(consumer),
    )
