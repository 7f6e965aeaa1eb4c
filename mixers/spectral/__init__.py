"""Mixers in the frequency domain and long convolutions."""
