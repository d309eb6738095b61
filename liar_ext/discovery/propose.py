"""Propose a row of the table: of one stack of blocks, or of an encoder and a decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from liar_ext.discovery.blocks import find_blocks
from liar_ext.discovery.describing import (
    Tried,
    describe,
    has_experts,
    prepare,
    trace_of,
    with_shared,
)
from liar_ext.discovery.experts_proof import prove_experts
from liar_ext.discovery.instance import Refused
from liar_ext.discovery.parts import propose_parts
from liar_ext.discovery.proof import prove_folders
from liar_ext.discovery.stream import find_stream
from liar_ext.discovery.stream_fields import prove_narrow_folder, with_fields
from liar_ext.discovery.stream_proof import check_every_block, prove_stream
from liar_ext.errors import one_line
from liar_ext.models.families.reasons import ROUTED
from liar_ext.models.family import WITHOUT, Family


def propose(
    model_class: type[nn.Module], config: Any, given: nn.Module | None
) -> tuple[Family, list[str], list[str]]:
    """Return a row for a class of model, what was proved of it, and what else is to be known.

    Raises
    ------
    Refused
        If neither attention nor MLP can be described.
    """
    tried, name = prepare(model_class, config, given), config.model_type
    instance = tried.instances[0]
    if getattr(config, "is_encoder_decoder", False):
        return propose_parts(tried, name)
    blocks = find_blocks(instance)
    trace, found, missing = trace_of(blocks)
    described = describe(tried, name, blocks, trace, found, missing)
    described = with_shared(tried, blocks, trace, found, described)
    family, missing, notes = described.family, described.missing, described.notes
    folders = prove_folders(instance, family)
    if has_experts(family):
        folders += prove_experts(tried.instances, family)
    try:
        family, narrowed = _with_stream(tried, family)
        heads = f"of the heads of the family, the stream names those of {model_class.__name__}"
        notes += [heads] if instance.model.base_model is not instance.model else []
    except Refused as error:
        missing["hidden"], narrowed = str(error), []
    without = {name: missing[name] for name in WITHOUT if name in missing}
    return replace(family, without=without), described.proved + folders + narrowed, notes


def _with_stream(tried: Tried, family: Family) -> tuple[Family, list[str]]:
    """Return a row with the residual stream, and what was proved of that.

    Raises
    ------
    Refused
        If it can't be described.
    """
    if has_experts(family):
        raise Refused(ROUTED)
    try:
        stream = find_stream(tried.instances[0], family)
    except Refused:
        raise
    except Exception as error:  # whatever a stranger's code raises where it gets something else
        said = f"{type(error).__name__}: {one_line(error, 120)}"
        raise Refused(f"who reads and writes it can't be seen: {said}") from error
    family = replace(family, stream=stream)
    proved = prove_stream(tried.instances, family)
    if tried.whole is not None:
        check_every_block(tried.whole, family)
    family, told = with_fields(tried.instances, family)
    return family, [proved, *prove_narrow_folder(tried.instances[0], family, told)]
