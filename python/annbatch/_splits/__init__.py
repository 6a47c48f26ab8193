"""Which rows each split, rank and epoch reads."""
