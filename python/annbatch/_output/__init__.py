"""In which form batches come back, and the arguments that say so."""
