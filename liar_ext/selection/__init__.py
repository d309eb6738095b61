"""Selection: score units, measure what the model feels, spread the budget over layers."""
