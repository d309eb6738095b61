"""The whole job: calibrate, score, allocate, reconstruct, slice; for one budget or several."""
