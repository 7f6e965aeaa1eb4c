"""Promises of what stands around token mixers: norms and channel mixers, blocks, stems, fusions, shortcuts, heads, schedules."""

from . import blocks, heads, layers, schedules, shared, stems

__all__ = ["blocks", "heads", "layers", "schedules", "shared", "stems"]
