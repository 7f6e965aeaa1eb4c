"""Results of claims, kept and put into docs/claims.md: `python -m mixerzoo.tools.claims`."""

from .page import PAGE, STORE, keep, main, render, stored, verdicts

__all__ = ["PAGE", "STORE", "keep", "main", "render", "stored", "verdicts"]
