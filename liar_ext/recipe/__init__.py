"""The recipe of a job: every choice in one place, to be repeated."""

from liar_ext.recipe.recipe import Recipe

__all__ = ["Recipe"]
