"""What a loader reads: where data lie, what is in there, and that datasets fit together."""
