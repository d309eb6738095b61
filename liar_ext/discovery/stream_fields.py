"""Which config fields follow a smaller hidden size, found by building the class with them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from liar_ext.checkpoint.quietening import quiet
from liar_ext.checkpoint.stock_config import dense_config, equal_config, in_transformers
from liar_ext.discovery.instance import Instance, Refused
from liar_ext.discovery.proof import equal_plan, saved, unit_of
from liar_ext.discovery.rows import registered
from liar_ext.discovery.shrinking import HEADS, KV_HEADS
from liar_ext.discovery.stream_proof import narrowable, some_features
from liar_ext.models.family import Family
from liar_ext.models.reading import block_config
from liar_ext.models.sites import sites
from liar_ext.plan import Plan, SitePlan
from liar_ext.surgery.units import apply_plan


def with_fields(
    instances: Sequence[Instance], family: Family
) -> tuple[Family, tuple[SitePlan, bool] | None]:
    """Return a row with the config fields that follow the hidden size, and a narrowing they tell.

    The proof of the fields is that the stock class, built with them, has the shapes of a narrowed
    model. The narrowing comes with whether heads follow; it is None where no fields tell of any.
    """
    model = instances[0].model
    for fields, multiple, features, heads in _choices(instances, family):
        stream = replace(family.stream, config=fields, multiple_of=multiple)
        trial = replace(family, stream=stream)
        with registered(trial):
            try:
                small = _narrowed(model, features, heads)
                built = equal_config(small, dense_config(model.config))
            except Exception:  # a stranger's class and config have rules of their own
                continue
        if built is not None:
            return trial, (features, heads)
    fields = dict.fromkeys(_holding(instances, family), "hidden")
    return replace(family, stream=replace(family.stream, config=fields, multiple_of=None)), None


def prove_narrow_folder(
    instance: Instance, family: Family, told: tuple[SitePlan, bool] | None
) -> list[str]:
    """Return in words by what a saved folder with a smaller hidden size loads.

    Raises
    ------
    Refused
        If one doesn't, or not with the same outputs.
    """
    model, said = instance.model, []
    with registered(family), tempfile.TemporaryDirectory() as folder, quiet():
        try:
            if told is not None:
                loaded = saved(instance, _plan(model, *told), Path(folder) / "equal")
                said.append(f"with a smaller hidden size it loads in {loaded}")
            elif in_transformers(type(model)):
                plan = _plan(model, some_features(narrowable(model).size, 2), False)
                loaded = saved(instance, plan, Path(folder) / "unequal", ours=True)
                said.append(f"with a smaller hidden size it loads by {loaded} alone")
        except Refused as error:  # such as embeddings scaled by what the config says
            raise Refused(f"with a smaller hidden size {error}") from error
    return said


def _holding(instances: Sequence[Instance], family: Family) -> list[str]:
    """Return the config fields that hold the hidden size in every instance."""
    with registered(family):
        sizes = [sites(each.model)[0].d_out for each in instances]
    return _equal_fields(instances, family, sizes)


def _equal_fields(instances: Sequence[Instance], family: Family, sizes: list[int]) -> list[str]:
    configs = [block_config(family, each.model.config).to_dict() for each in instances]
    return [
        name
        for name in configs[0]
        if all(
            type(config.get(name)) is int and config[name] == size
            for config, size in zip(configs, sizes, strict=True)
        )
    ]


def _choices(
    instances: Sequence[Instance], family: Family
) -> Iterator[tuple[dict[str, str], str, SitePlan, bool]]:
    """Yield fields, what their size is a multiple of, and features of which they must tell.

    The last is whether as many heads stay as the features make.
    """
    model, names = instances[0].model, _holding(instances, family)
    with registered(family):
        size = sites(model)[0].d_out
        at = (
            [sites(each.model, ("attn",), unit_of(each.model))[0] for each in instances]
            if family.attn
            else []
        )
    heads = getattr(block_config(family, model.config), "num_attention_heads", 0)
    some = [{name: "hidden"} for name in names]  # as few as it takes
    for fields in some + [dict.fromkeys(names, "hidden")] * (len(some) > 1):
        odd = next(n for n in range(size // 2, 0, -1) if n % 2 and (not heads or n % heads))
        yield fields, "any", some_features(size, 2, odd), False
        if heads and size // 2 >= heads:
            yield fields, "heads", some_features(size, 2, size // 2 // heads * heads), False
        if at and heads:
            counts = {
                name: kind
                for kind, pattern in (("heads", HEADS), ("kv_heads", KV_HEADS))
                for name in _equal_fields(instances, family, [s.sizes[kind] for s in at])
                if pattern.fullmatch(name)
            }
            count = at[0].units // 2 * at[0].width
            yield {**fields, **counts}, "head_dim", some_features(size, 2, count), True


def _plan(model: nn.Module, features: SitePlan, heads: bool) -> Plan:
    plan = equal_plan(model, ("attn",)) if heads else Plan(model.config.model_type, "auto", {})
    return replace(plan, hidden=features)


def _narrowed(model: nn.Module, features: SitePlan, heads: bool) -> nn.Module:
    small = copy.deepcopy(model)
    apply_plan(small, _plan(model, features, heads))
    return small
