"""What other programs load of this package; each is imported only when it calls."""
