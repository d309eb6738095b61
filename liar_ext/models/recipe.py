"""The recipe: every choice of a job, checked in one place, to and from YAML and JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from liar_ext.models import recipe_checks as check
from liar_ext.models.plan import Budget
from liar_ext.models.recipe_fields import GROUPS, PRESETS, Fields, recipe_fields
from liar_ext.system.errors import InputError, did_you_mean, refusing

VERSION = 1
MOST_BYTES = 1 << 20  # of a file: a recipe takes one or two thousand
# Fields that recipes had once, with the values that changed nothing.
REMOVED: dict[str, tuple[Any, ...]] = {
    "at_least": (1,),
    "probe_keep": ("auto",),
    "refine": (0,),
    "target": (None, "auto"),
    "refit": (False,),
    "candidates": ([], ()),
    "judge": (16,),
}


@dataclass(frozen=True)
class Recipe(Fields):
    """Every choice of a job, shared by :func:`liar_ext.prune`, the command, report and folder.

    docs/options.md has the reasons for all defaults. A field of a wrong type or value, or that does
    not go with another, raises InputError. ``text_digests`` are of the texts that a job read, by
    their names: ``liar prune`` refuses to repeat the job if one has changed.
    """

    text_digests: Mapping[str, str] = field(
        default_factory=dict, compare=False, metadata={"check": check.digests}
    )

    @classmethod
    def build(cls, start: Recipe | Budget | float | None = None, **choices: Any) -> Recipe:
        """Return a recipe: ``start``, or the default one, with some choices made otherwise.

        Parameters
        ----------
        start : Recipe, Budget or float, optional
            A budget, or its fraction, stands for ``keep=start``.
        **choices
            Fields; ``keep`` may be a :class:`liar_ext.Budget`, which sets all of its fields.
            ``preset`` names the recipe to start from, ``sites`` is ``kinds`` as the command has it:
            ``"all"``, ``"attn"`` or ``"mlp"``. InputError for one that is no field.
        """
        if start is not None and not isinstance(start, Recipe):
            if "keep" in choices:
                raise InputError(f"recipe: keep must be given once, got {start!r} besides keep=")
            start, choices = None, {"keep": start, **choices}
        if isinstance(choices.get("keep"), Budget):
            budget = asdict(choices.pop("keep"))
            if twice := sorted(budget.keys() & choices.keys()):
                raise InputError(f"recipe: {', '.join(twice)} must be given once, in the Budget")
            choices |= budget
        if "sites" in choices:
            if "kinds" in choices:
                raise InputError("recipe: sites and kinds are the same choice; leave one out")
            choices["kinds"] = check.read_sites(choices.pop("sites"))
            if isinstance(choices["kinds"], str):
                known = "all, attn, mlp, encoder or decoder"
                raise check.wrong("sites", f"be {known}", choices["kinds"])
        if "preset" in choices:
            name = check.one_of(tuple(PRESETS))("preset", choices.pop("preset"))
            if start is not None:
                raise InputError("recipe: preset and a recipe were given; leave one out")
            choices = {**PRESETS[name], **choices}
        _check_names(choices)
        if choices.keys() & {"calibration", "eval"}:
            choices["text_digests"] = {}
        return replace(start or cls(), **choices)

    def settled(self) -> Recipe:
        """Return the recipe with what ``schedule="auto"`` stands for where nothing is measured.

        ``layerwise``, or ``one-pass`` where ``reconstruct`` is ``none`` or ``bias``: these solve
        for no target. A job of a model that can't be walked says so in its report.
        """
        if self.schedule != "auto":
            return self
        solves = self.reconstruct not in ("none", "bias")
        return replace(self, schedule="layerwise" if solves else "one-pass")

    @classmethod
    def preset(cls, name: str, **choices: Any) -> Recipe:
        """Return the recipe ``fast``, ``balanced`` (the default one), ``best``, ...: a preset."""
        return cls.build(preset=name, **choices)

    def to_dict(self) -> dict[str, Any]:
        """Return the version and the fields, as JSON has them."""
        found = {each.name: plain(getattr(self, each.name)) for each in fields(self)}
        if not found["text_digests"]:
            del found["text_digests"]
        return {"version": VERSION, **found}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Recipe:
        """Return the recipe of some fields; what is missing is as by default.

        Fields of older versions are dropped if they had no effect. An unknown field or version
        raises InputError.
        """
        if not isinstance(facts, Mapping):
            said = f"recipe: must be a mapping of fields, got {check.shown(facts)}"
            raise InputError(f"{said}; a line is keep: 0.8, for one")
        facts = dict(facts)
        if "multiple_of" in facts and "tile" not in facts:  # its name in version 0.1.0
            facts["tile"] = facts.pop("multiple_of")
        version = facts.pop("version", VERSION)
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"recipe: version must be {VERSION}, got {check.shown(version)}; read it with the "
                "liar_ext that wrote it"
            )
        facts = {name: each for name, each in facts.items() if each not in REMOVED.get(name, ())}
        digests = facts.pop("text_digests", {})
        _check_names(facts)
        return cls(**facts, text_digests=digests)

    def to_json(self) -> str:
        """Return the recipe as strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, written: str) -> Recipe:
        """Read a recipe from JSON text; see :meth:`from_dict`."""
        with refusing("recipe: not JSON", "", ValueError, RecursionError):
            facts = json.loads(written)
        return cls.from_dict(facts)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with the stages of the job as headings."""
        facts = self.to_dict()
        lines = [yaml_lines({"version": facts["version"]})]
        for group, title in GROUPS.items():
            own = {each.name: facts[each.name] for each in recipe_fields(group=group)}
            lines += [f"\n# {title}\n", yaml_lines(own)]
        if self.text_digests:
            own = {"text_digests": facts["text_digests"]}
            lines += ["\n# Texts as they were read\n", yaml_lines(own)]
        return "".join(lines)

    @classmethod
    def from_yaml(cls, written: str) -> Recipe:
        """Read a recipe from YAML text, without tags or aliases; see :meth:`from_dict`."""
        # PyYAML raises anything at dates, numbers and nesting that Python can't hold.
        with refusing("recipe: not YAML", "", Exception, own="recipe: "):
            facts = yaml.load(written, Loader=_Loader)  # noqa: S506  (a safe loader)
        return cls.from_dict(facts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe: as JSON where the name ends in ``.json``, else as YAML."""
        written = self.to_json() + "\n" if Path(path).suffix == ".json" else self.to_yaml()
        Path(path).write_text(written, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe that :meth:`save` wrote, or a person did; InputError if it is none."""
        hint = "give a file of YAML or JSON in UTF-8"
        with refusing(f"recipe: can't read {os.fspath(path)!r}", hint, OSError, ValueError):
            with Path(path).open("rb") as file:
                written = file.read(MOST_BYTES + 1)
            if len(written) > MOST_BYTES:
                raise ValueError(f"it must have at most {MOST_BYTES} bytes")
            text = written.decode("utf-8-sig")
        try:
            return cls.from_json(text) if Path(path).suffix == ".json" else cls.from_yaml(text)
        except InputError as error:
            raise InputError(f"{error} (in {path})") from None


if Recipe.__doc__:  # python -OO drops it
    Recipe.__doc__ += "\n    Parameters\n    ----------\n" + "".join(
        f"    {n.name} : {n.type}, default {n.default!r}\n        {n.metadata['help']}\n"
        for n in recipe_fields()
    )


def _check_names(choices: Mapping[str, Any]) -> None:
    known = [each.name for each in recipe_fields()]
    for name in choices:
        if name not in known:
            hint = did_you_mean(name, known, "docs/options.md has all of them")
            raise InputError(f"recipe: unknown field {check.shown(name)}; {hint}")


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases (which can grow beyond all bounds) and double keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError("recipe: YAML must hold no alias (*name); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise InputError("recipe: YAML must name each field once")
        return made


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which puts what :class:`_Loader` takes for a number in quotes, too."""


# YAML 1.1 takes 1e-3 for text, since it lacks a point.
FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def plain(value: Any) -> Any:
    """Return a field's value as JSON has it: lists, and "inf" for infinity."""
    if isinstance(value, tuple):
        return list(value)
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def yaml_lines(facts: Mapping[str, Any]) -> str:
    """Return lines of YAML, one for each field, lists in brackets."""
    style = {"Dumper": _Dumper, "allow_unicode": True, "width": math.inf}
    lines = []
    for name, value in facts.items():
        flow = None if isinstance(value, list) else False  # None: brackets around what is inside
        lines.append(yaml.dump({name: value}, default_flow_style=flow, **style))
    return "".join(lines)
