"""Selection: importance scores, error curves, sensitivities, and the budget over the sites."""
