"""Where the prunable sites of a model are.

A transformer block has two sites. Each has *producers*, whose rows go, and one *consumer*, whose
columns go::

    mlp     gate, up  ──▶ x (d_in = channels)         ──▶ down   unit = channel
    attn    q, k, v   ──▶ x (d_in = heads · head_dim) ──▶ o      unit = head or KV group

A block of a decoder that reads an encoder has a third one, ``cross_attn``, of the kind ``attn``.
Each expert of a mixture is a site, such as ``"3.mlp.5"``; all of a layer share parameters, and must
keep equally many channels. One that every token passes beside these is ``"3.shared_mlp"``.

Paths come from the table of families, and sizes from the modules: layers may be unequal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.models.family import Part, Wiring
from liar_ext.models.layers import get_path, has_path, layer_at, layer_of, out_in
from liar_ext.models.plan import ATTN_UNITS, KINDS, PARTS
from liar_ext.models.registry import family_of
from liar_ext.models.running import Block, block_config, parts_of
from liar_ext.system.errors import InputError

CROSS, SHARED = "cross_attn", "shared_mlp"
# By what a row calls it.
_KIND = {"attn": "attn", CROSS: "attn", "mlp": "mlp", SHARED: "mlp", "context_mlp": "mlp"}


@dataclass(frozen=True)
class Site:
    """A consumer layer with the units that it reads."""

    name: str  # block and kind, as in "3.mlp", or "decoder.3.cross_attn" of several stacks
    kind: str  # attn or mlp
    block: int  # its index in the stack
    unit: str  # channel, head, or kv_group: a key/value head with all query heads that share it
    units: int
    width: int  # consumer input features of a unit: 1, head_dim, or group_size · head_dim
    # Runs of units, which must keep equally many each: the key/value heads where query heads are
    # removed under grouped-query attention; else 1.
    groups: int
    d_in: int  # features that the consumer reads: units · width
    d_out: int  # features that it writes
    consumer: str  # path in the model
    producers: tuple[str, ...]  # paths of the layers that lose rows with a unit
    unit_params: int  # leave with a unit: producer rows, their biases, consumer columns
    unit_weights: int  # the same without biases: multiply-adds per token
    head_dim: int  # of attention only, else 0
    kv_heads: int  # of attention only, else 0
    path: str  # of the block in the model
    wiring: Wiring = field(repr=False)  # from the table of families
    part: Part = field(repr=False)  # the stack of blocks that it is in
    expert: int | None = None  # which expert of the layer, where there are several
    experts: int = 0  # how many there are
    active: float = 1.0  # fraction of the tokens that the site reads, on average
    key_dim: int = 0  # size of a key head where heads keep a state, as linear attention does

    @property
    def team(self) -> str:
        """What sites share that must keep equally many units: the layer, or the site alone."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    @property
    def params(self) -> int:
        """Parameters that the units hold together."""
        return self.units * self.unit_params

    @property
    def keys_stay(self) -> bool:
        """Whether units are query heads that share keys and values, which stay when they leave."""
        return self.unit == "head" and self.kv_heads < self.sizes["heads"]

    @property
    def shared(self) -> bool:
        """Whether the units are read by more than the consumer, or it reads more than they are."""
        return bool(self.wiring.also or self.wiring.columns)

    @property
    def reads(self) -> list[tuple[str, Tensor, slice]]:
        """What reads the units: path of the layer, features of the site, columns of the layer."""
        paths = (self.consumer, *(f"{self.path}.{name}" for name in self.wiring.also))
        features = torch.arange(self.d_in, device="cpu").view(self.units, len(paths), -1)
        count = self.d_in // len(paths)
        columns = {"": slice(None), "first": slice(count), "last": slice(-count, None)}
        where = columns[self.wiring.columns]
        return [(path, features[:, index].flatten(), where) for index, path in enumerate(paths)]

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by name: features; experts; for attention also heads, kv_heads, group_size, ..."""
        sizes = {"features": self.d_in, "experts": self.experts}
        if self.head_dim:
            sizes["features"] //= 1 + len(self.wiring.also)
            heads, keys = sizes["features"] // self.head_dim, self.kv_heads * self.key_dim
            sizes |= {"heads": heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
            sizes |= {"group_size": heads // self.kv_heads, "key_features": keys}
            sizes["conv_features"] = self.d_in + 2 * keys  # of values, keys and queries
        return sizes

    @property
    def shape(self) -> tuple[str, str, int, int, int, int]:
        """What sites have in common that take the same time: kind, unit and sizes."""
        return self.kind, self.unit, self.units, self.width, self.groups, self.d_out

    def features(self, kept: Sequence[int]) -> Tensor:
        """Return the consumer's input features of units, ``(len(kept) · width,)`` int64."""
        features = torch.arange(self.d_in, device="cpu").view(self.units, self.width)
        return features[list(kept)].flatten()

    def row_units(self, producer: str, rows: int) -> Tensor:
        """Return the unit of each of ``rows`` rows of a producer, int64; -1 of rows that stay."""
        stack = self.wiring.stacked.get(producer.removeprefix(f"{self.path}."))
        if stack is None:
            return runs(rows, self.units)
        heads = self.d_in // (self.head_dim or 1)
        groups = (self.kv_heads or self.units) if stack.by_group else 1
        parts = []
        for matrix, size in stack.rows(rows, self.d_in, heads).items():
            stays = self.keys_stay and matrix in stack.grouped
            parts.append(runs(size, 1) - 1 if stays else runs(size, self.units))
        return torch.cat([part.view(groups, -1) for part in parts], dim=1).flatten()

    def per_unit(self, values: Tensor) -> Tensor:
        """Return ``Σ_{j∈u} values_j``, (units,), of values of features, (d_in,), or of units."""
        if values.shape not in ((self.units,), (self.d_in,)):
            raise InputError(
                f"per_unit: {self.name} takes {self.units} values by unit or {self.d_in} by "
                f"feature, got shape {tuple(values.shape)}; score its own model's sites"
            )
        return values if len(values) == self.units else values.reshape(self.units, -1).sum(1)

    def unit_flops(self, seq_len: int) -> int:
        """Return the FLOPs of one forward pass that leave with one unit.

        ``2 · n · unit_weights``, of an expert times the fraction of tokens that it gets, and for
        attention ``4 · n² · width`` more for QKᵀ and PV, with n = ``seq_len`` tokens; for heads
        that keep a state ``6 · n · key_dim · width``, to read, change and read it again. A
        multiply-add counts as 2, and attention as the full square also where it is causal;
        normalisation, activation, softmax and short convolutions aren't counted.
        """
        reads = 6 * self.key_dim if self.key_dim else 4 * seq_len
        attention = reads * seq_len * self.width if self.head_dim else 0
        return round(2 * seq_len * self.active * self.unit_weights) + attention


def runs(rows: int, units: int) -> Tensor:
    """Return the unit of each row where every unit has one run of rows, on the CPU."""
    return torch.arange(units, device="cpu").repeat_interleave(rows // units)


def sites(model: nn.Module, kinds: Sequence[str] = KINDS, attn_unit: str = "auto") -> list[Site]:
    """List the sites of a model, by stack and block, attention before MLP.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A base model or a task model; its layers may be unequal.
    kinds : sequence of {"attn", "mlp", "encoder", "decoder"}
        Which sites to list; with a part of the model those of this part alone.
    attn_unit : {"auto", "kv_group", "head"}
        Unit of attention; "auto" takes KV groups where query heads share key/value heads.

    Raises
    ------
    InputError
        If the architecture isn't known, a kind or unit isn't one or isn't prunable there, or a
        layer isn't an ordinary linear layer with floating-point weights.
    """
    only, given = set(kinds) & set(PARTS), kinds
    kinds = [kind for kind in given if kind in KINDS]
    if not kinds or len(only) + len(kinds) < len(given):
        known = ", ".join((*KINDS, *PARTS))
        raise InputError(f"sites: kinds must be some of {known}, got {list(given)}")
    if attn_unit not in ATTN_UNITS:
        raise InputError(
            f"sites: attn_unit must be one of {', '.join(ATTN_UNITS)}, got {attn_unit!r}"
        )
    family, found = family_of(model), []
    parts = parts_of(model, family)
    # A decoder alone has the layers that read an encoder, too, and never runs them.
    whole = len(parts) == len(family.all_parts)
    if only and not only & {part.name for part, _ in parts}:
        raise InputError(f"sites: {family.name!r} has no part {min(only)}; leave --sites out")
    for part, blocks in parts:
        if only and part.name not in only:
            continue
        rows = {
            label: _rows(part, label, model.config)
            for label, kind in _KIND.items()
            if kind in kinds and (whole or label != CROSS)
        }
        for index, block in enumerate(blocks):
            for label in rows:
                wiring = wiring_of(family.name, rows[label], block[1]) if rows[label] else None
                if wiring is not None:
                    site = _read_site(part, label, index, block, wiring, attn_unit)
                    found += [
                        replace(site, name=f"{site.name}.{expert}", expert=expert)
                        for expert in range(site.experts)
                    ] or [site]
    if not found:
        reasons = [why_whole(model, kind) or "no block has any" for kind in kinds]
        raise InputError(
            f"sites: {family.name!r} has nothing to prune in {' and '.join(kinds)}: "
            f"{'; '.join(reasons)}"
        )
    if attn_unit == "auto" and attn_unit_of(found) == "kv_group":  # a head is a group of its own
        found = [replace(s, unit="kv_group") if s.unit == "head" else s for s in found]
    return found


def attn_unit_of(at: Sequence[Site]) -> str:
    """Return the attention unit of a plan for these sites, some of which leave by groups alone."""
    attn = [site for site in at if site.head_dim]
    single = any(site.keys_stay for site in attn) or {site.unit for site in attn} == {"head"}
    return "head" if single else "kv_group"


def teams_of(at: Sequence[Site]) -> dict[str, list[Site]]:
    """Return the sites that must keep equally many units, by :attr:`Site.team`."""
    teams: dict[str, list[Site]] = {}
    for site in at:
        teams.setdefault(site.team, []).append(site)
    return teams


def why_whole(model: nn.Module, kind: str) -> str:
    """Return why the table has no such sites for a model; empty if it has."""
    family = family_of(model)
    if any(_rows(part, kind, model.config) for part in family.all_parts):
        return ""
    described = family.wirings(kind)
    if kind in family.without or not described:
        return family.without.get(kind, "its row describes none")
    said = ", ".join(f"{name}={value}" for name, value in described[0].requires.items())
    return f"its row is that of models with {said}"


def get_consumer_weight(model: nn.Module, site: Site) -> Tensor:
    """Return the consumer's W of ``y = W x + b``, (d_out, d_in); a copy of shared ones alone."""
    weight = layer_of(model, site).weight.detach()
    return weight.T if site.wiring.transposed else weight


def get_consumer_bias(model: nn.Module, site: Site) -> Tensor | None:
    """Return the consumer's bias b, (d_out,), without a copy; None if it has none."""
    bias = layer_of(model, site).bias
    return None if bias is None else bias.detach()


def _rows(part: Part, label: str, config: Any) -> list[Wiring]:
    """Return the alternatives for a kind of site that are true for a config."""
    config = block_config(part, config)
    return [
        wiring
        for wiring in part.alternatives(label)
        if all(getattr(config, name, None) == value for name, value in wiring.requires.items())
    ]


def wiring_of(family: str, rows: Sequence[Wiring], block: nn.Module) -> Wiring | None:
    """Return the first alternative whose layers a block has; None where it needs none."""
    for wiring in rows:
        kind = nn.Module if wiring.experts is None else nn.Parameter
        if all(has_path(block, layer, kind) for layer in wiring.layers):
            return wiring
    if any(wiring.optional for wiring in rows):
        return None
    raise InputError(
        f"sites: a block of {family!r} lacks one of {', '.join(rows[-1].layers)}; "
        "register a family that fits with liar_ext.register_family"
    )


def _read_site(
    part: Part, label: str, index: int, block: Block, wiring: Wiring, attn_unit: str
) -> Site:
    """Return the site of a block; of a mixture of experts what all of them have in common."""
    path, module = block
    name = ".".join(str(each) for each in (part.name, index, label) if each != "")
    experts = 0 if wiring.experts is None else len(get_path(module, wiring.consumer))
    found = {layer: layer_at(module, layer, 0 if experts else None) for layer in wiring.layers}
    rows = {layer: out_in(name, layer, found[layer], wiring)[0] for layer in wiring.layers}
    d_out, d_in = out_in(name, wiring.consumer, found[wiring.consumer], wiring)
    readers = 1 + len(wiring.also)
    d_in = rows[wiring.producers[0]] if wiring.columns else d_in * readers
    unit, units, groups, head_dim, kv_heads, key_dim = "channel", d_in, 1, 0, 0, 0
    if wiring.head_dim:
        size, *count = (get_path(module, each) for each in wiring.head_dim.split(" // "))
        head_dim = size // count[0] if count else size
        key_dim = get_path(module, wiring.key_dim) if wiring.key_dim else 0
        heads = d_in // head_dim // readers
        kv_heads = _count_kv_heads(name, wiring, rows, heads, head_dim, key_dim or head_dim)
        grouped = kv_heads < heads
        if wiring.whole_groups or attn_unit == "kv_group" or (attn_unit == "auto" and grouped):
            unit, units = "kv_group", kv_heads
        else:
            unit, units, groups = "head", heads, kv_heads if grouped else 1
    for number in wiring.numbers:
        if not number.endswith("?") and not has_path(module, number, int):
            raise InputError(f"sites: {name} has no number {number!r}; mend the row of its family")
    site = Site(
        name=name,
        kind=_KIND[label],
        block=index,
        unit=unit,
        units=units,
        width=d_in // units,
        groups=groups,
        d_in=d_in,
        d_out=d_out,
        consumer=f"{path}.{wiring.consumer}",
        producers=(),
        unit_params=0,
        unit_weights=0,
        head_dim=head_dim,
        kv_heads=kv_heads,
        path=path,
        wiring=wiring,
        part=part,
        experts=experts,
        active=get_path(module, wiring.experts.router).top_k / experts if experts else 1.0,
        key_dim=key_dim,
    )
    # A query head that leaves a KV group leaves the group's key and value behind.
    producers = (*wiring.producers, *(() if site.keys_stay else wiring.key_value))
    weights, biases = d_in * d_out, 0
    for each in wiring.per_head:
        if (held := get_path(module, each)) is not None:
            runs = held.shape[head_axis(module, each)]
            biases += _count_owned(site, each, runs) * (held.numel() // runs)
    for layer in producers:
        owned = _count_owned(site, layer, rows[layer])
        weights += owned * (found[layer].weight.numel() // rows[layer])
        biases += owned if found[layer].bias is not None else 0
    return replace(
        site,
        producers=tuple(f"{path}.{producer}" for producer in producers),
        unit_params=(weights + biases) // units,
        unit_weights=weights // units,
    )


def _count_kv_heads(
    site: str, wiring: Wiring, rows: Mapping[str, int], heads: int, head_dim: int, key_dim: int
) -> int:
    """Return the number of key/value heads, by the rows of the layers of an attention site."""
    if wiring.key_value:
        return rows[wiring.key_value[0]] // head_dim
    for layer, stack in wiring.stacked.items():
        if stack.shared and layer in rows:
            each = stack.rows(rows[layer], heads * head_dim, heads)
            kv_heads, left = divmod(min(each[m] for m in stack.grouped if m in each), key_dim)
            if sum(each.values()) != rows[layer] or left or kv_heads < 1:
                raise InputError(
                    f"sites: {layer} of {site} must stack {', '.join(stack.matrices)} of {heads} "
                    f"query heads, got {rows[layer]} rows; register a family that fits"
                )
            return kv_heads
    return heads


def head_axis(block: nn.Module, name: str) -> int:
    """Return the dimension of a parameter in which a block has something for each head."""
    return int(isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Embedding))


def _count_owned(site: Site, producer: str, rows: int) -> int:
    """Return how many of the rows of a producer leave with the units."""
    if producer in site.wiring.stacked:
        return int((site.row_units(producer, rows) >= 0).sum())
    return rows // site.units * site.units
