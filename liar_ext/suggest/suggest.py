"""Propose a row of the table of families for a model that it lacks, and prove it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liar_ext.checkpoint.inspection import read_config
from liar_ext.checkpoint.quietening import no_bars
from liar_ext.checkpoint.reading import reading
from liar_ext.errors import InputError, one_line
from liar_ext.models.families.common import TWO_STREAMS
from liar_ext.models.family import WITHOUT, Family, Part
from liar_ext.models.registry import FAMILIES
from liar_ext.models.running import DECODER_IDS, DECODER_MASK, base_path
from liar_ext.models.sites import CROSS
from liar_ext.suggest.describe import Described, Stack
from liar_ext.suggest.instance import Blocks, Refused, Tried, find_stacks, prepare
from liar_ext.suggest.proof import KINDS, prove, prove_folders, tells_sizes
from liar_ext.suggest.sizes import with_config
from liar_ext.suggest.small_config import MOST_DEPTH, bound_layers, check_sizes, most_layers

# What a pruned or quantised folder says beside the sizes of its dense model.
EXTRA = ("liar", "per_layer_config", "quantization_config", "auto_map")
WIDTH = 88  # of the code of a row
HIDDEN = "the residual stream isn't described"


@dataclass(frozen=True)
class Suggestion:
    """A row of the table of families, and what stands behind it."""

    family: Family  # the row; its ``without`` says what it lacks, and why
    known: bool  # whether the table has it already; nothing was tried then
    proved: tuple[str, ...] = ()  # what was proved of it, each a sentence
    notes: tuple[str, ...] = ()  # what else is to be known, such as what was left alone

    @property
    def code(self) -> str:
        """Python code that registers the row."""
        words: set[str] = set()
        text = _write(self.family, words, 4)
        return (
            "from liar_ext import register_family\n"
            f"from liar_ext.models.family import {', '.join(sorted(words))}\n\n"
            f"register_family(\n    {text}\n)\n"
        )


@torch.no_grad()
def suggest_family(model: Any) -> Suggestion:
    """Propose a row of the table of families for a model or its config, and prove it.

    A tiny instance of the class is built from the config with its sizes made small; the blocks,
    the linear layers in them and who reads whom are found by moving single outputs in one pass.
    Then the row is registered for a moment, and the instance pruned by it in every combination:
    slicing must equal zeroing, and saved folders must load. What can't be proved isn't in the row.
    Residual streams and experts aren't looked for; they can be added by hand.

    Parameters
    ----------
    model : transformers.PreTrainedModel or PreTrainedConfig
        A model, whose weights aren't read; or a config, from which the class is built that it
        names in ``architectures``, or the base model.

    Returns
    -------
    Suggestion
        Its ``code`` registers the row. A family of the table comes back as it is.

    Raises
    ------
    InputError
        If neither attention nor MLP can be described, with the reason.

    Examples
    --------
    >>> import liar_ext
    >>> print(liar_ext.suggest_family(model).code)  # doctest: +SKIP
    """
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    name = getattr(config, "model_type", None)
    if not isinstance(name, str) or not name or not hasattr(config, "to_dict"):
        raise InputError(
            "suggest_family: takes a model of transformers or its config, with a model_type, got "
            f"{type(model).__name__}"
        )
    if name in FAMILIES:
        return Suggestion(FAMILIES[name], known=True)
    try:
        if wrong := check_sizes(config):
            raise Refused(wrong)
        with no_bars(), torch.device("cpu"):
            return _propose(prepare(_class_of(model), config), config)
    except Refused as error:
        raise InputError(
            f"suggest_family: no row for {name!r}: {one_line(error, 700)}; describe the family by "
            "hand, see docs/extend.md"
        ) from error


def suggest_for(name: str) -> Suggestion:
    """Propose a row for the model in a folder, or in a repository of the hub, by its config alone.

    No code of a folder or repository is run. For a model that needs its own, build it, and call
    :func:`liar_ext.suggest_family` with it.

    Raises
    ------
    InputError
        If there is no config, transformers has no such architecture, or no row can be proposed.
    """
    fields = _fields(name)
    kind = fields.get("model_type")
    if kind in FAMILIES:
        return Suggestion(FAMILIES[kind], known=True)
    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"families: transformers {transformers.__version__} has no architecture "
            f"{str(kind)[:60]!r}, and no code of {name} is run; load the model by what it needs, "
            "and call liar_ext.suggest_family(model)"
        )
    fields = {key: value for key, value in fields.items() if key not in EXTRA}
    if most_layers(fields) > MOST_DEPTH:
        fields = bound_layers(fields)
    with reading(f"the config of {name}", "families"):
        config = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    return suggest_family(config)


def _fields(name: str) -> Mapping[str, Any]:
    """Return the fields of a config."""
    path = Path(name)
    if path.is_dir():
        return read_config(path, "families")
    if path.suffix == ".gguf" or path.is_absolute() or path.exists():
        raise InputError(f"families: {name} must be a model folder or a hub id")
    from transformers import PreTrainedConfig

    with reading(name, "families"):
        return PreTrainedConfig.get_config_dict(name)[0]


def _class_of(model: Any) -> type[nn.Module]:
    """Return the class of a model, or the one that a config is for."""
    if isinstance(model, nn.Module):
        return type(model)
    import transformers

    names = getattr(model, "architectures", None) or [""]
    stock = getattr(transformers, str(names[0]), None)
    if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel):
        return stock
    mapping = transformers.AutoModel._model_mapping
    if type(model) in mapping:
        found = mapping[type(model)]
        return found[0] if isinstance(found, tuple | list) else found
    raise Refused(
        f"transformers {transformers.__version__} has no model class for {type(model).__name__}; "
        "build the model, and give that to liar_ext.suggest_family"
    )


def _propose(tried: Tried, config: Any) -> Suggestion:
    """Return a row for one stack of blocks, or for an encoder and a decoder.

    Raises
    ------
    Refused
        If neither attention nor MLP can be described.
    """
    instance, name = tried.instances[0], config.model_type
    stacks = find_stacks(instance)
    if getattr(config, "is_encoder_decoder", False):
        found = _two_stacks(tried, name, stacks)
    elif len(stacks) > 1:
        prefix = base_path(instance.model)
        names = ", ".join(prefix + blocks.path for blocks in stacks)
        raise Refused(f"there are several lists of blocks: {names}")
    else:
        found = Stack(tried, name, stacks[0]).own()
    proved = found.proved + prove_folders(instance, found.family)
    missing = {"hidden": HIDDEN} | found.missing
    without = {each: missing[each] for each in WITHOUT if each in missing}
    family = replace(found.family, without=without)
    return Suggestion(family, False, tuple(proved), tuple(found.notes))


def _two_stacks(tried: Tried, name: str, stacks: list[Blocks]) -> Described:
    """Return a row for an encoder that a decoder reads, each described first, then proved whole.

    Raises
    ------
    Refused
        If there aren't two stacks of blocks, or one of them can't be described.
    """
    paths = [blocks.path for blocks in stacks]
    if len(stacks) != 2:
        raise Refused(f"an encoder and a decoder are two lists of blocks, found {', '.join(paths)}")
    encoder, decoder = (Stack(tried, name, blocks) for blocks in stacks)
    rows: dict[str, Described] = {}
    for part, stack in (("encoder", encoder), ("decoder", decoder)):
        try:
            rows[part] = stack.own()
        except Refused as error:
            raise Refused(f"{stack.blocks.path}: {error}") from error
    if CROSS in encoder.found:
        raise Refused(f"blocks of {paths[0]} read something beside the encoder's text")
    notes = [f"{part}: {note}" for part, row in rows.items() for note in row.notes]
    cross = decoder.cross()
    if cross.family.attn is None:
        notes.append(f"decoder: attention to the encoder stays whole: {cross.missing['attn']}")
    reads = inspect.signature(tried.instances[0].model.forward).parameters
    mask = DECODER_MASK if DECODER_MASK in reads else ""
    inputs = {
        "encoder": {"input": "input_ids"},
        "decoder": {"input": DECODER_IDS, "mask": mask, CROSS: cross.family.attn},
    }
    parts = [
        Part(part, row.blocks, row.attn, row.mlp, config=row.config, **inputs[part])
        for part, row in ((part, described.family) for part, described in rows.items())
    ]
    family, _ = with_config(tried.instances, Family(name=name, parts=tuple(parts)))
    missing = {"hidden": TWO_STREAMS} | _missing(family, rows, cross)
    return Described(family, prove(tried.instances, family), missing, notes)


def _missing(family: Family, rows: Mapping[str, Described], cross: Described) -> dict[str, str]:
    """Return what the parts lack, and why, each reason once."""
    found: dict[str, list[str]] = {}
    for part, row in rows.items():
        for kind in KINDS.keys() & row.missing.keys():
            found.setdefault(kind, []).append(f"{part}: {row.missing[kind]}")
    for row in (*rows.values(), cross):
        for reason in filter(None, row.missing.get("stock", "").split("; ")):
            # Of all parts together a field may tell what it doesn't of one.
            if not tells_sizes(family, "mlp" if "channels" in reason else "attn"):
                found.setdefault("stock", []).append(reason)
    return {kind: "; ".join(dict.fromkeys(reasons)) for kind, reasons in found.items()}


def _write(value: Any, words: set[str], indent: int | None = None, label: str = "") -> str:
    """Return a value as code behind a label; on one line if it fits, or always without an indent.

    The classes that it is made of are added to ``words``.
    """
    if isinstance(value, str):
        return label + json.dumps(value, ensure_ascii=False)  # newlines are escaped
    if value is None or isinstance(value, int | float):
        return label + repr(value)
    first, last, end = "(", ")", ""
    if isinstance(value, Mapping):
        first, last = "{", "}"
        items = [(f"{json.dumps(key)}: ", each) for key, each in value.items()]
    elif type(value) in (tuple, list):
        items, end = [("", each) for each in value], "," * (len(value) == 1)
    else:
        first, items = f"{type(value).__name__}(", _set_fields(value)
        words.add(type(value).__name__)
    line = ", ".join(_write(each, words, None, name) for name, each in items)
    line = f"{label}{first}{line}{end}{last}"
    if indent is None or indent + len(line) < WIDTH:
        return line
    deeper = indent + 4
    lines = [f"{' ' * deeper}{_write(each, words, deeper, name)},\n" for name, each in items]
    return f"{label}{first}\n{''.join(lines)}{' ' * indent}{last}"


def _set_fields(value: Any) -> list[tuple[str, Any]]:
    """Return label and value of the fields that aren't as they are by default."""
    fields = inspect.signature(type(value)).parameters
    needed = [name for name, field in fields.items() if field.default is field.empty]
    blank = type(value)(*(getattr(value, name) for name in needed))
    bare = needed if isinstance(value, tuple) else []
    return [
        ("" if name in bare else f"{name}=", getattr(value, name))
        for name in fields
        if name in needed or getattr(value, name) != getattr(blank, name)
    ]
