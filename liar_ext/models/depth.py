"""Whole blocks: which models can lose some, and a model without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from liar_ext.models.configs import skeleton
from liar_ext.models.experts import check_count
from liar_ext.models.family import BORROWED, Part
from liar_ext.models.plan import SitePlan
from liar_ext.models.registry import family_of
from liar_ext.models.running import Block, block_config, parts_of, saved_tensors
from liar_ext.models.sites import sites
from liar_ext.system.errors import InputError, refusing

PLAIN = bool | int | float | str | tuple | None
SHAPE = "shape of "
Number = tuple[nn.Module, str, int]  # a number that a module keeps, and what it becomes


def why_lent(model: nn.Module) -> str:
    """Return what blocks read of earlier ones beside hidden states; empty if nothing."""
    family = family_of(model)
    lent = family.lends and getattr(block_config(family, model.config), family.lends)
    return BORROWED if lent else ""


def why_no_chain(model: nn.Module, blocks: int) -> str:
    """Return why so many blocks are no chain that can be run one by one; empty if they are."""
    family = family_of(model)
    if reason := family.without.get("layerwise") or why_lent(model):
        return reason
    if family.parts:
        return "it has several stacks of blocks"
    known = {site.block for site in sites(model)} == set(range(blocks))
    return "" if known else "some of its blocks have no site"


def stack_of(model: nn.Module) -> tuple[Part, list[Block]]:
    """Return the only stack of blocks of a model; InputError if none of it can be left out."""
    family = family_of(model)
    part, blocks = parts_of(model, family)[0]
    counted = getattr(block_config(part, model.config), "num_hidden_layers", None)
    said, reason = getattr(model.config, "liar", None) or {}, why_no_chain(model, len(blocks))
    for broken, why in (
        (family.repeats or "*" in part.blocks, "blocks share their weights"),
        (counted != len(blocks), "no field of its config counts its blocks"),
        (said.get("layers") == "unequal", "its layers are unequal already; remove blocks first"),
    ):
        reason = reason or (why if broken else "")
    if reason:
        raise InputError(f"blocks: this {family.name!r} can lose none: {reason}")
    return part, blocks


def count_blocks_kept(model: nn.Module, keep: float) -> int:
    """Return how many blocks stay: at most the fraction ``keep``; InputError if that is none."""
    _, blocks = stack_of(model)
    count = math.floor(keep * len(blocks) + 1e-9)
    if count < 1:
        raise InputError(
            f"blocks: {keep:.4g} of {len(blocks)} blocks is less than one; raise keep_blocks"
        )
    return count


def check_block_count(model: nn.Module, keep: float) -> None:
    """Raise InputError if neither the first blocks nor evenly spread ones can stay alone.

    :func:`check_kept_blocks` checks those that are chosen.
    """
    count, total = count_blocks_kept(model, keep), len(stack_of(model)[1])
    refused, attending = None, attending_blocks(model)
    if count == 1 and attending and 0 not in attending:
        raise InputError(
            f"blocks: {keep:.4g} of {total} blocks leaves the first one, which has no attention, "
            f"and {model.config.model_type!r} does not generate without; raise keep_blocks"
        )
    for kept in (range(count), [place * total // count for place in range(count)]):
        try:
            _renumbered(model, kept)
            return
        except InputError as error:
            refused = refused or error
    raise refused


def attending_blocks(model: nn.Module) -> set[int]:
    """Return the blocks of which one must stay for a cache to count tokens: all, but of hybrids."""
    from transformers.cache_utils import CacheLayerMixin, DynamicCache

    part, _ = stack_of(model)
    layers = DynamicCache(config=block_config(part, model.config)).layers
    return {index for index, each in enumerate(layers) if isinstance(each, CacheLayerMixin)}


def check_kept_blocks(model: nn.Module, plan: SitePlan) -> list[Number]:
    """Return the numbers that change without the blocks that a plan doesn't keep.

    InputError is raised if the model can't lose them.
    """
    _, blocks = stack_of(model)
    check_count("the model", len(blocks), "blocks", plan)
    return _renumbered(model, plan.kept)


def keep_blocks(model: nn.Module, kept: Sequence[int], numbers: Sequence[Number]) -> None:
    """Remove all other blocks, in place; config and :func:`check_kept_blocks`' numbers follow."""
    part, blocks = stack_of(model)
    _shorten(part, model.config, kept, len(blocks))
    for module, name, value in numbers:
        setattr(module, name, value)
    # The list stays the same module.
    held = model.get_submodule(blocks[0][0].rpartition(".")[0])._modules
    left = [blocks[index][1] for index in kept]
    held.clear()
    held.update({str(index): block for index, block in enumerate(left)})


def _shorten(part: Part, config: Any, kept: Sequence[int], count: int) -> None:
    """Let a config say that these of ``count`` blocks are all; lists with an item each follow."""
    config = block_config(part, config)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, type(value)(value[index] for index in kept))
    config.num_hidden_layers = len(kept)
    if getattr(config, "stage_names", None):  # of a backbone, which gives what its last block does
        config.stage_names = config.stage_names[: len(kept) + 1]
        config.set_output_features_output_indices(None, None)


def _renumbered(model: nn.Module, kept: Sequence[int]) -> list[Number]:
    """Return the numbers to change: of its place in a block, and of blocks outside of them.

    What the config builds without the other blocks is compared with what it builds with all. If
    anything else differs, as a block of another kind would, InputError is raised.
    """
    from huggingface_hub.errors import StrictDataclassError

    part, blocks = stack_of(model)
    config = copy.deepcopy(model.config)
    _shorten(part, config, kept, len(blocks))
    what = f"blocks: no config of {model.config.model_type!r} says these blocks alone"
    with refusing(what, "leave keep_blocks out", ValueError, StrictDataclassError):
        config = type(config).from_dict(config.to_dict())  # as a loader reads it
    pairs = _pairs(model, kept, skeleton(type(model), model.config), skeleton(type(model), config))
    numbers: list[Number] = []
    for module, dense, fewer, moved in pairs:
        one, two = _facts(dense), _facts(fewer)
        # What served kinds of blocks that are all gone may stay, be it no tensor of a folder.
        names = {*two, *(name for name in one if name.startswith(SHAPE))}
        for name in sorted(n for n in names if one.get(n) != two.get(n)):
            if (one.get(name), two.get(name)) != moved:
                raise InputError(
                    f"blocks: the config of {model.config.model_type!r} builds others without the "
                    f"blocks that go: {name} of a {type(dense).__name__} is {two.get(name)}, not "
                    f"{one.get(name)}; leave keep_blocks out"
                )
            numbers.append((module, name, two[name]))
    return numbers


def _pairs(
    model: nn.Module, kept: Sequence[int], dense: nn.Module, fewer: nn.Module
) -> Iterator[tuple[nn.Module, nn.Module, nn.Module, tuple[int, int]]]:
    """Yield each module of a model that stays, and what it is in two others.

    The last are the numbers that a place of its block, or the count of all, has in these.
    """
    family = family_of(model)
    own, before, after = (parts_of(each, family)[0][1] for each in (model, dense, fewer))
    inside = {module for _, block in own for module in block.modules()}
    one, two = dict(dense.named_modules()), dict(fewer.named_modules())
    for path, module in model.named_modules():
        if module not in inside and path in one and path in two:
            yield module, one[path], two[path], (len(before), len(after))
    for place, index in enumerate(kept):
        trio = own[index][1], before[index][1], after[place][1]
        names = [[name for name, _ in block.named_modules()] for block in trio]
        if not names[0] == names[1] == names[2]:
            raise InputError(
                f"blocks: the config of {model.config.model_type!r} builds other layers in block "
                f"{index} once others are gone; leave keep_blocks out"
            )
        for each in zip(*(block.modules() for block in trio), strict=True):
            yield *each, (index, place)


def _facts(module: nn.Module) -> dict[str, Any]:
    """Return the plain values that a module keeps, its class, and the shapes of what is saved."""
    own = {n: v for n, v in vars(module).items() if isinstance(v, PLAIN) and n != "training"}
    shapes = {f"{SHAPE}{name}": tuple(each.shape) for name, each in saved_tensors(module).items()}
    return own | shapes | {"class": type(module).__name__}
