"""Models: which families there are, where their sites and residual streams lie, how they run."""
