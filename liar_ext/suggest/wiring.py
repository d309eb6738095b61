"""Read the sites of a block from what reaches the columns of a layer.

A consumer reads nothing of the stream but through other layers of its block, its producers. What
one output of a producer reaches says what it is::

    one column, its token alone              a channel; of attention, a gate on a head's outputs
    the columns of a head, its token alone   a query
    the columns of a group, other tokens     a key
    a column in each head of a group, other tokens      a value
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from liar_ext.models.family import Stack, Wiring
from liar_ext.suggest.instance import Refused
from liar_ext.suggest.trace import Reach, Trace

SHARED = ("key", "value")


class Found(NamedTuple):
    """A site as a trace shows it, with sizes of the block that was traced."""

    kind: str  # cross_attn reads keys and values of something else than the stream
    wiring: Wiring  # without head_dim, numbers and config
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0


def find_sites(trace: Trace) -> tuple[dict[str, Found], dict[str, str]]:
    """Return the sites of a block by kind, and the reason for each kind that can't be described."""
    found: dict[str, list[Found]] = {"attn": [], "cross_attn": [], "mlp": []}
    reasons: dict[str, list[str]] = {"attn": [], "mlp": []}
    mixed = ""
    for consumer, parents in trace.parents.items():
        if not parents or consumer in trace.readers:
            continue
        reach = trace.reaches(consumer)
        rows = [row for each in reach.values() for row in each]
        kind = "mlp" if all(row.local and len(row.columns) < 2 for row in rows) else "attn"
        if all(row.local for row in rows) and kind == "attn":  # such as a low-rank product
            mixed = f"; columns of {consumer} depend on several rows of {', '.join(parents)}"
            mixed += _through(trace, parents)
            continue
        try:
            read = _read_attention if kind == "attn" else _read_mlp
            site = read(trace, consumer, reach)
            wiring = replace(site.wiring, output_norm=trace.norm_after(consumer))
            found[site.kind].append(site._replace(wiring=wiring))
        except Refused as error:
            reasons[kind].append(str(error))
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
            without[kind] = (reasons[kind] or [_nothing(trace, kind) + mixed * (kind == "mlp")])[0]
    return sites, without


def _experts(trace: Trace) -> str:
    """Return the module that holds a matrix for each of several experts, repeatedly; or nothing."""
    for path, module in trace.block.named_modules():
        counts = [len(each) for each in module.parameters(recurse=False) if each.ndim == 3]
        if len(counts) > 1 and len(set(counts)) == 1:
            return path
    return ""


def _nothing(trace: Trace, kind: str) -> str:
    reads = "that attention writes" if kind == "attn" else "that reads channels one by one"
    said = f"no linear layer {reads} was found in the block"
    if trace.repeated:
        return f"{said}; {trace.repeated[0]} runs several times in a pass"
    if trace.others:
        return f"{said}; {trace.others[0]} is the weight of no such layer"
    return said


def _through(trace: Trace, producers: list[str], said: str = ", through") -> str:
    """Return the modules that lie between, in words; nothing if there are none."""
    between = trace.mixers(producers)
    return f"{said} {', '.join(between[:3])}" if between else ""


def _read_mlp(trace: Trace, consumer: str, reach: dict[str, list[Reach]]) -> Found:
    """Return the wiring of an MLP: every producer has a row, or several, for each channel."""
    channels = trace.layers[consumer].input.shape[-1]
    stacked = {}
    for producer, rows in reach.items():
        owners = [row.columns[0] if row.columns else -1 for row in rows]
        count, rest = divmod(len(rows), channels)
        if rest or -1 in owners:
            raise Refused(
                f"{producer} has {len(rows)} rows, of which {len(rows) - owners.count(-1)} reach "
                f"the {channels} columns of {consumer}"
            )
        if count > 1:
            first = [row for row, owner in enumerate(owners) if owner == 0]
            linear = [trace.is_linear_in(producer, row, consumer) for row in first]
            names = tuple(f"part{index}" for index in range(count))
            if count == 2 and linear.count(True) == 1:  # what acts linearly is ``up``
                names = tuple("up" if each else "gate" for each in linear)
            stacked[producer] = _stack(producer, names, owners, None, (channels, channels, 1))
        elif owners != list(range(channels)):
            raise Refused(f"rows of {producer} reach the columns of {consumer} in another order")
    return Found("mlp", _wiring(trace, tuple(reach), consumer, stacked=stacked))


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
    if len(sizes) != 1 or heads % min(sizes):
        raise Refused(f"keys and values of {consumer} aren't of groups of one size")
    kv_heads = heads // sizes.pop()
    own, shared, stacked = [], {}, {}
    for producer, each in roles.items():
        names = [role for role, _, _ in each]
        kinds = tuple(dict.fromkeys(names))
        owners = [owner for _, owner, _ in each]
        if len(kinds) > 1:
            laid = (heads, kv_heads, head_dim)
            stacked[producer] = _stack(producer, kinds, owners, names, laid)
            own.append(producer)
            continue
        count = kv_heads if kinds[0] in SHARED else heads
        if owners != [head for head in range(count) for _ in range(head_dim)]:
            raise Refused(f"{producer} has {len(each)} rows for {count} heads of {head_dim}")
        if kinds[0] not in SHARED:
            own.append(producer)
        elif kinds[0] in shared:
            raise Refused(f"{consumer} reads the {kinds[0]}s of several layers")
        else:
            shared[kinds[0]] = producer
    key_value = tuple(shared[role] for role in SHARED if role in shared)
    if len(key_value) == 1 or not own or not (key_value or stacked):
        raise Refused(f"{consumer} reads no queries, keys and values of layers that a row can name")
    wiring = _wiring(trace, tuple(own), consumer, key_value=key_value, stacked=stacked)
    keys = key_value or tuple(name for name, stack in stacked.items() if stack.shared)
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
    if row.local:
        kind = "query" if whole else "gate" if single else None
        return (kind, heads[0], 1) if kind and len(heads) == 1 else None
    kind = "key" if whole else "value" if single else None
    return (kind, heads[0] // len(heads), len(heads)) if kind else None


def _stack(
    producer: str,
    names: tuple[str, ...],
    owners: list[int],
    roles: list[str] | None,
    sizes: tuple[int, int, int],
) -> Stack:
    """Return the layout of a weight that holds several matrices.

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
        laid_roles, laid_owners = map(list, zip(*laid, strict=True))
        if laid_owners == owners and roles in (None, laid_roles):
            return Stack(names, by_group)
    raise Refused(f"the rows of {producer} stack {', '.join(names)} in an order of its own")


def _wiring(trace: Trace, producers: tuple[str, ...], consumer: str, **settings: object) -> Wiring:
    """Return a wiring whose layers all store their weights in one way."""
    wiring = Wiring(producers=producers, consumer=consumer, **settings)
    stored = {trace.layers[name].transposed for name in wiring.layers}
    if len(stored) > 1:
        raise Refused(f"some layers around {consumer} store their weights transposed, some don't")
    return replace(wiring, transposed=stored.pop())
