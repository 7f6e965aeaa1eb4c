"""The documentation's site: pages that are written when it is built, from classes, docstrings and stored results."""

from .pages import Page, pages

__all__ = ["Page", "pages"]
