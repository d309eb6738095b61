"""Texts and batches: from documents to what a model takes."""
