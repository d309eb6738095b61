"""Calibration: sums over the calibration set, all that decisions and solves ever read."""
