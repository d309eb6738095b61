"""Keywords of functions: each field of a recipe that they use, with its type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_type_hints

import pytest

from liar_ext import Budget, InputError, Recipe
from liar_ext.models.recipe_checks import CompressOptions, JobOptions, PruneOptions, TextOptions
from liar_ext.models.recipe_fields import recipe_fields

WIDER = {"keep": float | Budget, "kinds": Sequence[str]}  # than the type of the field
BESIDE = {"preset": str, "sites": str | Sequence[str]}


def test_keywords_are_the_fields_with_their_types():
    types = get_type_hints(Recipe) | WIDER
    used = {each.name: types[each.name] for each in recipe_fields(in_python=True)}
    assert get_type_hints(JobOptions) == used | BESIDE
    assert PruneOptions.__annotations__.keys() == {*used, *BESIDE, *TextOptions.__annotations__}
    others = {each.name: types[each.name] for each in recipe_fields()}
    del others["model"], others["calibration"]  # arguments
    own = {"heal": str | float | None, "max_memory": int | str | None, "overwrite": bool}
    assert get_type_hints(CompressOptions) == others | BESIDE | own


def test_a_recipe_is_built_from_a_preset_and_sites():
    assert Recipe.build(0.5, preset="best", sites="attn") == Recipe(
        keep=0.5, rescale=True, kinds=("attn",)
    )
    assert Recipe.build(sites=["mlp"]) == Recipe(kinds=("mlp",))
    assert Recipe.build(Budget(0.5), preset="fast") == Recipe.preset("fast", keep=0.5)


@pytest.mark.parametrize(
    ("start", "choices", "message"),
    [
        (Recipe(), {"preset": "fast"}, "preset and a recipe"),
        (None, {"sites": "mlp", "kinds": ("mlp",)}, "the same choice"),
        (
            None,
            {"sites": "ffn"},
            "sites must be all, attn, mlp, .*, got 'ffn'",
        ),
        (None, {"preset": ["fast"]}, "preset must be one of fast"),
    ],
)
def test_keywords_that_do_not_go_together_are_refused(start, choices, message):
    with pytest.raises(InputError, match=message):
        Recipe.build(start, **choices)
