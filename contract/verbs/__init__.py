"""Verbs of `python -m mixerzoo` that need the contract."""
