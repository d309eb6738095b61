"""The whole job: calibrate, score, allocate, reconstruct, slice; for one budget or several."""

from liar_ext.job.pruning import prune
from liar_ext.job.sweeping import sweep

__all__ = ["prune", "sweep"]
