"""What every room may use: where warnings point, and sizes."""
