"""Learning rates over time."""

from .schedules import SCHEDULES

__all__ = ["SCHEDULES"]
