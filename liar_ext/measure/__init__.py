"""How fast a model is and what memory it takes, pruned beside dense."""
