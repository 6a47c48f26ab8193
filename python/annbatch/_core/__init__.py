"""The op library, and what runs on it: ops and their errors, requests of samplers, passes over opened datasets."""
