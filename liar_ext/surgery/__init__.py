"""Surgery: slice the modules of a model by a plan; nothing is computed here."""
