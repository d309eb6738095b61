"""Proof, in processes of their own, that what a folder claims is there."""
