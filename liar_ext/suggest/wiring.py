"""Read the sites of a block from what reaches the columns of a layer.

A consumer reads nothing of the stream but through other layers of its block, its producers. What
one output of a producer reaches says what it is::

    one column, its token alone              a channel; of attention, a gate on a head's outputs
    the columns of a head, its token alone   a query
    the columns of a group, other tokens     a key
    a column in each head of a group, other tokens      a value
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liar_ext.models.family import HeadInput, Stack, Wiring
from liar_ext.models.registry import row_units
from liar_ext.suggest.instance import Refused
from liar_ext.suggest.trace import Reach, Trace

LARGE = (1e3, 1e6)  # times an output, so that what a norm adds to a mean square is nothing
ROUNDING = 1e-5  # many norms compute in float32


def mixers(trace: Trace, producers: Iterable[str]) -> list[str]:
    """Return the modules without matrices that read outputs of some layers, such as norms."""
    found = set()
    for producer in producers:
        output = trace.layers[producer].output
        still, moved = (
            _inputs(trace, producer, by) for by in (torch.zeros_like(output), trace.noise(output))
        )
        found |= {n for n in still.keys() & moved.keys() if not torch.equal(still[n], moved[n])}
    return sorted(found)


def norm_after(trace: Trace, consumer: str) -> str:
    """Return the norm that reads what a layer gives, and that alone; empty if none does.

    Then the norm and the block put out the same whatever large factor that gets.
    """
    output = trace.layers[consumer].output
    if not _same(*(trace.run(consumer, factor * output) for factor in LARGE)):
        return ""
    for name, read in _inputs(trace, None, None).items():
        if torch.equal(read.flatten(), output.flatten()):
            module = trace.block.get_submodule(name)  # or a dropout before it, which scales along
            with suppress(TypeError):  # a module that takes more than one tensor is none
                if _same(*(module(factor * read) for factor in LARGE)):
                    return name
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= ROUNDING * float(one.abs().max())


def input_by_head(trace: Trace, consumer: str, heads: int, first: nn.Module) -> HeadInput | None:
    """Return the argument with a slice a head that comes into a block, if there is one.

    It is (batch, heads, queries, keys), such as a bias of relative positions. Where a module passes
    it on to the next block, the one of ``first``, the first block, has made it: of a table with a
    column a head, or by itself.
    """
    found: list[tuple[HeadInput, Tensor]] = []
    passed: dict[str, int] = {}

    def watch(path: str) -> list[Any]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            names = list(inspect.signature(module.forward).parameters)
            for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
                sliced = isinstance(value, Tensor) and value.ndim == 4
                if sliced and value.shape[1] == heads > 1 and name in names:
                    found.append((HeadInput(path, names.index(name), name), value))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            mine = [value for each, value in found if each.module == path]
            if mine and isinstance(output, tuple):
                same = [i for i, value in enumerate(output) if value is mine[-1]]
                passed.update({path: same[0]} if same else {})

        module = trace.block.get_submodule(path)
        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    with ExitStack() as hooks:
        for name, _ in trace.block.named_modules():
            for hook in watch(name) if consumer.startswith(f"{name}.") else ():
                hooks.callback(hook.remove)
        trace.run(None, None)
    if not found:
        return None
    head_input = found[-1][0]
    if head_input.module not in passed:
        return head_input
    tables = [
        name
        for name, child in first.get_submodule(head_input.module).named_children()
        if isinstance(child, nn.Embedding) and child.weight.shape[1] == heads
    ]
    table, output = tables[0] if tables else "", passed[head_input.module]
    return replace(head_input, output=output, table=table, own=not table)


def _inputs(trace: Trace, producer: str | None, move: Tensor | None) -> dict[str, Tensor]:
    """Return what modules without matrices read while one layer, if any, puts out another."""
    inputs: dict[str, Tensor] = {}

    def watch(path: str, module: nn.Module) -> Any:
        def before(_: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[path] = args[0].clone()

        return module.register_forward_pre_hook(before)

    with ExitStack() as hooks:
        for name, module in trace.block.named_modules():
            if name and name not in trace.layers and next(module.children(), None) is None:
                hooks.callback(watch(name, module).remove)
        trace.run(producer, move)
    return inputs


SHARED = ("key", "value")


class Found(NamedTuple):
    """A site as a trace shows it.

    Parameters
    ----------
    kind : {"attn", "cross_attn", "mlp"}
        Which site; ``cross_attn`` reads keys and values of something else than the stream.
    wiring : Wiring
        Its layers, without ``head_dim``, numbers and config.
    heads, kv_heads, head_dim : int
        Of the block that was traced; 0 for an MLP.
    """

    kind: str
    wiring: Wiring
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
            wiring = replace(site.wiring, output_norm=norm_after(trace, consumer))
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
    """Return why a kind of site isn't there at all."""
    reads = "that attention writes" if kind == "attn" else "that reads channels one by one"
    said = f"no linear layer {reads} was found in the block"
    if trace.repeated:
        return f"{said}; {trace.repeated[0]} runs several times in a pass"
    if trace.others:
        return f"{said}; {trace.others[0]} is the weight of no such layer"
    return said


def _through(trace: Trace, producers: list[str], said: str = ", through") -> str:
    """Return the modules that lie between, in words; nothing if there are none."""
    between = mixers(trace, producers)
    return f"{said} {', '.join(between[:3])}" if between else ""


def _read_mlp(trace: Trace, consumer: str, reach: dict[str, list[Reach]]) -> Found:
    """Return the wiring of an MLP: every producer has a row, or several, for each channel."""
    channels = trace.layers[consumer].columns
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
            stacked[producer] = _stack(producer, names, owners, None, channels, channels, 1)
        elif owners != list(range(channels)):
            raise Refused(f"rows of {producer} reach the columns of {consumer} in another order")
    return Found("mlp", _wiring(trace, tuple(reach), consumer, stacked=stacked))


def _read_attention(trace: Trace, consumer: str, reach: dict[str, list[Reach]]) -> Found:
    """Return the wiring of attention, with the sizes of its heads."""
    head_dim = _head_dim(trace, consumer, reach)
    heads = trace.layers[consumer].columns // head_dim
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
            stacked[producer] = _stack(producer, kinds, owners, names, heads, kv_heads, head_dim)
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
    columns = trace.layers[consumer].columns
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
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Stack:
    """Return the layout of a weight that holds several matrices.

    ``owners`` has, for every row, its head, or for keys and values its group; ``roles`` the name of
    its matrix, if that is known.
    """
    rows, group = len(owners), heads // kv_heads
    lengths = [(kv_heads if name in SHARED else heads) * head_dim for name in names]
    for by_group in (False, True) if sum(lengths) == rows else ():
        stack = Stack(names, by_group)
        parts = [torch.full((length,), index) for index, length in enumerate(lengths)]
        groups = kv_heads if by_group else 1
        kinds = torch.cat([part.view(groups, -1) for part in parts], dim=1).flatten().tolist()
        if roles is not None and [names[kind] for kind in kinds] != roles:
            continue
        shared = [names[kind] in SHARED for kind in kinds]
        units = [owner if s else owner // group for owner, s in zip(owners, shared, strict=True)]
        width = group * head_dim
        if row_units(stack, rows, kv_heads, width, kv_heads, False).tolist() != units:
            continue
        heads_of = [-1 if s and group > 1 else o for o, s in zip(owners, shared, strict=True)]
        if row_units(stack, rows, heads, head_dim, kv_heads, group > 1).tolist() == heads_of:
            return stack
    raise Refused(f"the rows of {producer} stack {', '.join(names)} in an order of its own")


def _wiring(trace: Trace, producers: tuple[str, ...], consumer: str, **settings: object) -> Wiring:
    """Return a wiring whose layers all store their weights in one way."""
    wiring = Wiring(producers=producers, consumer=consumer, **settings)
    stored = {trace.layers[name].transposed for name in wiring.layers}
    if len(stored) > 1:
        raise Refused(f"some layers around {consumer} store their weights transposed, some don't")
    return replace(wiring, transposed=stored.pop())
