"""Put the row of an encoder and a decoder together from rows of each stack, and prove it whole."""

from __future__ import annotations

import inspect
from dataclasses import replace

from liar_ext.models.family import WITHOUT, Family, Part, Wiring
from liar_ext.suggest.config_fields import with_shared_config
from liar_ext.suggest.describe import Described, describe
from liar_ext.suggest.instance import Refused, Tried
from liar_ext.suggest.proof import prove, prove_folders, tells_sizes
from liar_ext.suggest.trace import Blocks, Trace
from liar_ext.suggest.wiring import find_sites

HIDDEN = "encoder and decoder have a residual stream each"
CROSS = "cross_attn"


def propose_two_stacks(
    tried: Tried, name: str, stacks: list[Blocks]
) -> tuple[Family, list[str], list[str]]:
    """Return a row for an encoder that a decoder reads, what was proved, and what to know.

    Raises
    ------
    Refused
        If there aren't two stacks of blocks, or one of them can't be described.
    """
    instance = tried.instances[0]
    if len(stacks) != 2:
        names = ", ".join(blocks.path for blocks in stacks)
        raise Refused(f"an encoder and a decoder are two lists of blocks, found {names}")
    encoder, decoder = (_Stack(tried, name, blocks) for blocks in stacks)
    if CROSS in encoder.found:
        raise Refused(f"blocks of {stacks[0].path} read something beside the encoder's text")
    notes = [f"encoder: {note}" for note in encoder.described.notes]
    notes += [f"decoder: {note}" for note in decoder.described.notes]
    cross = decoder.cross(tried, name)
    if cross.family.attn is None:
        notes.append(f"decoder: attention to the encoder stays whole: {cross.missing['attn']}")
    mask = "decoder_attention_mask"
    if mask not in inspect.signature(instance.model.forward).parameters:
        mask = ""
    parts = (
        encoder.part("encoder", "input_ids", "attention_mask"),
        decoder.part("decoder", "decoder_input_ids", mask, cross.family.attn),
    )
    family = with_shared_config(tried.instances, Family(name=name, parts=parts))
    missing = {"hidden": HIDDEN} | _missing(family, encoder.described, decoder.described, cross)
    without = {each: missing[each] for each in WITHOUT if each in missing}
    proved = prove(tried.instances, family) + prove_folders(instance, family)
    return replace(family, without=without), proved, notes


class _Stack:
    """One of the two, with what was found in a block of it."""

    def __init__(self, tried: Tried, name: str, blocks: Blocks) -> None:
        self.blocks, self.trace = blocks, Trace(blocks.calls[min(1, len(blocks.calls) - 1)])
        self.found, self.missing = find_sites(self.trace)
        try:
            self.described = describe(
                tried, name, blocks, self.trace, self.found, self.missing, self.found.get(CROSS)
            )
        except Refused as error:
            raise Refused(f"{blocks.path}: {error}") from error

    def cross(self, tried: Tried, name: str) -> Described:
        """Return the row of the attention to another stack alone, or one that says why not."""
        if CROSS not in self.found:
            why = f": {self.missing['attn']}" if "attn" in self.missing else ""
            raise Refused(
                f"no attention of {self.blocks.path} that a row can name reads the encoder{why}"
            )
        alone, apart = {"attn": self.found[CROSS]}, self.found.get("attn")
        try:
            return describe(tried, name, self.blocks, self.trace, alone, {}, apart)
        except Refused as error:
            return Described(Family(name=name), missing={"attn": str(error)})

    def part(self, name: str, reads: str, mask: str, cross: Wiring | None = None) -> Part:
        """Return the part of the row."""
        row = self.described.family
        made = {"cross_attn": cross, "config": row.config, "input": reads, "mask": mask}
        return Part(name, row.blocks, row.attn, row.mlp, **made)


def _missing(
    family: Family, encoder: Described, decoder: Described, cross: Described
) -> dict[str, str]:
    """Return what the parts lack, and why, each reason once."""
    found: dict[str, str] = {}
    for kind in ("attn", "mlp"):
        reasons = [
            f"{name}: {each.missing[kind]}"
            for name, each in (("encoder", encoder), ("decoder", decoder))
            if kind in each.missing
        ]
        found |= {kind: "; ".join(reasons)} if reasons else {}
    reasons = [
        reason
        for each in (encoder, decoder, cross)
        for reason in each.missing.get("stock", "").split("; ")
        # Of all parts together a field may tell what it doesn't of one.
        if reason and not tells_sizes(family, "mlp" if "channels" in reason else "attn")
    ]
    return found | ({"stock": "; ".join(dict.fromkeys(reasons))} if reasons else {})
