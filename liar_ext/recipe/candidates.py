"""Candidates: recipes that differ in a few choices, of which a job keeps the one that is best."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from liar_ext.errors import InputError
from liar_ext.recipe import text
from liar_ext.recipe.checks import shown

GROUPS = ("selection", "reconstruction")  # in whose fields the recipes of one job may differ
NOT_TRIED = ("candidates", "rescale")  # what comes after the choice


def candidates_of(recipe: Any) -> dict[str, Any]:
    """Return the recipes that a recipe wants tried, by what is said of them, itself first.

    Each of ``recipe.candidates`` is one or more ``FIELD=VALUE`` with commas between them, values as
    YAML has them: ``criterion=obs``, ``criterion=obs,damp=0.1``.

    Parameters
    ----------
    recipe : liar_ext.Recipe
        With its ``candidates``; the recipes returned have none.

    Returns
    -------
    dict of str to liar_ext.Recipe

    Raises
    ------
    InputError
        If a candidate is of another form, changes what isn't selection or reconstruction, or can't
        be.
    """
    names = [
        each.name
        for each in fields(recipe)
        if each.metadata["group"] in GROUPS and each.name not in NOT_TRIED
    ]
    alone = replace(recipe, candidates=())
    changes = {each: _changes(each, names) for each in recipe.candidates}
    own = {name: getattr(alone, name) for each in changes.values() for name in each}
    found = {",".join(f"{name}={value}" for name, value in own.items()): alone}
    for each, changed in changes.items():
        other = replace(alone, **changed)
        if other not in found.values():
            found[each] = other
    return found


def _changes(candidate: str, names: list[str]) -> dict[str, Any]:
    """Return the fields that a candidate sets, of those that it may."""
    changes = {}
    for word in candidate.split(","):
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise InputError(
                f"recipe: candidates must be FIELD=VALUE, with FIELD of {', '.join(names)}, got "
                f"{shown(word)}; criterion=obs is one"
            )
        try:
            changes[name] = text.from_yaml(value)
        except InputError as error:
            raise InputError(f"{error} (candidates, {shown(word)})") from None
    return changes
