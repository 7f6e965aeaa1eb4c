"""Checkpoint files, and weights of other sources in our names."""
