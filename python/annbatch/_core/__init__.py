"""The op library and what is read through it: ops, requests of samplers, passes over opened datasets."""
