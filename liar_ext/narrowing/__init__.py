"""Narrowing: a smaller hidden size, with every reader of the residual stream solved for it."""
