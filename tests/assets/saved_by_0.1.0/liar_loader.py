"""Builds the layers that liar_plan.json says; config.json names it."""

from liar_ext.checkpoint import PrunedModel

__all__ = ["PrunedModel"]
