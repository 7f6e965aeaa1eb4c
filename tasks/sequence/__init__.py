"""Synthetic tasks over sequences."""
