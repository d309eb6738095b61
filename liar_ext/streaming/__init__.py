"""Models larger than memory: pruned one block at a time, read from their files and written back."""
