"""Healing: short training of a pruned model towards the outputs of its dense one."""
