"""Mixing by learned matrices over positions, and the gates made of it."""
