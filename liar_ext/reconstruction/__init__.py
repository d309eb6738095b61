"""Reconstruction: solve consumers for what was removed, with errors on held-out tokens."""
