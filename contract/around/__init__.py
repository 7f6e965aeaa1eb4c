"""Promises of what stands around token mixers: norms, channel mixers, blocks, stems, heads, schedules and the like."""

from . import blocks, heads, layers, schedules, shared, stems

__all__ = ["blocks", "heads", "layers", "schedules", "shared", "stems"]
