"""The operators: wrappers of the compiled kernels, their fakes, and the float64 reference."""

from liar_ext.ops.wrappers import build_info, gram_update_, obs_curve, reconstruct

__all__ = [
    "build_info",
    "gram_update_",
    "obs_curve",
    "reconstruct",
]
