"""A row of the table of families for a model that it lacks: looked for, and proved."""
