"""Checkpoints: save a pruned model, load it, prove that it is the one that was saved."""

from liar_ext.checkpoint.loading import load_model, load_pruned
from liar_ext.checkpoint.saving import save_pruned

__all__ = ["load_model", "load_pruned", "save_pruned"]
