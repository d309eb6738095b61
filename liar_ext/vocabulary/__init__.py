"""A smaller vocabulary: which tokens stay, the tokenizer without the others, and the model."""
