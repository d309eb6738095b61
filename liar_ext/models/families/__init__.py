"""The rows of the table of families, one module per kind of model."""
