"""Attention: dense, windowed, to chosen blocks or tokens, and what its caches share."""
