"""Healing: short training of a pruned model towards the outputs of its dense one."""

TRAIN = ("no-embeddings", "all", "norms", "lora")  # which weights are trained
