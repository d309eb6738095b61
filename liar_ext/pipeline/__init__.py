"""The whole job: calibrate, score, allocate, reconstruct, slice; for one budget or several."""

from liar_ext.pipeline.pipeline import prune
from liar_ext.pipeline.sweep import sweep

__all__ = ["prune", "sweep"]
