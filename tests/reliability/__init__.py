"""Attacks on what a user relies on, counted: ``make reliability`` writes docs/reliability.md."""
