"""The whole job: calibrate, score, allocate, reconstruct, slice."""

from liar_ext.pipeline.pipeline import prune

__all__ = ["prune"]
