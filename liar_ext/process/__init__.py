"""The process: its environment and memory, others of the same job, progress on a terminal."""
