"""Healing: short training of a pruned model towards the outputs of its dense one."""

MINUTES = {"best": 5.0}  # that a preset trains
RATE = 2e-4  # highest learning rate, at first
OF_SIZE = 1e-3  # that of a matrix of a causal language model, by the root mean square of its values
TRAIN = ("no-embeddings", "all", "norms", "lora")  # which weights are trained
