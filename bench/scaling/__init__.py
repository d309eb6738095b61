"""Seconds of jobs on GPUs by arithmetic: operations and bytes counted, none measured there."""
